//! Escaping of text from outside, and the parts of tables.

/// `text` escaped for use between tags and in attributes with double quotes.
///
/// Characters that no document may hold (control characters), and those that change the direction
/// of text, become the replacement character.
pub(super) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(character),
            c if c.is_control() || deceptive(c) => out.push(char::REPLACEMENT_CHARACTER),
            c => out.push(c),
        }
    }
    out
}

/// A cell of a table's body; `class` is in the style sheet, or empty.
pub(super) fn cell(class: &str, text: &str) -> String {
    if class.is_empty() {
        format!("<td>{}</td>", escaped(text))
    } else {
        format!("<td class=\"{class}\">{}</td>", escaped(text))
    }
}

/// The heading cell of a row.
pub(super) fn row_head(text: &str) -> String {
    format!("<th scope=\"row\">{}</th>", escaped(text))
}

/// The head of a table: `(title, class)` for each column.
pub(super) fn table_head(columns: &[(&str, &str)]) -> String {
    let cells = columns.iter().map(|(title, class)| match *class {
        "" => format!("<th scope=\"col\">{}</th>", escaped(title)),
        class => format!("<th scope=\"col\" class=\"{class}\">{}</th>", escaped(title)),
    });
    format!("<thead><tr>{}</tr></thead>\n", cells.collect::<String>())
}

/// Whether this is a direction mark or override, or a noncharacter.
fn deceptive(character: char) -> bool {
    matches!(character,
        '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{fffe}' | '\u{ffff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_gets_out_of_text_or_attributes() {
        let hostile = "</title><script>alert('x')</script> \" & \u{0} \u{1b}[2J \u{202e}gnp.exe";
        let escaped = escaped(hostile);
        assert!(!escaped.contains(['<', '>', '"', '\'', '\u{0}', '\u{1b}', '\u{202e}']), "{escaped}");
        let document = format!("<a b=\"{escaped}\">{escaped}</a>");
        let parsed = roxmltree::Document::parse(&document).unwrap();
        let text = parsed.root_element().text().unwrap();
        assert!(text.starts_with("</title><script>alert('x')</script> \" & \u{fffd}"), "{text}");
        assert_eq!(parsed.root_element().attribute("b"), Some(text));
    }

    #[test]
    fn cells() {
        assert_eq!(cell("number", "<1>"), "<td class=\"number\">&lt;1&gt;</td>");
        assert_eq!(row_head("a"), "<th scope=\"row\">a</th>");
        assert!(
            table_head(&[("a", ""), ("b", "number")]).contains("<th scope=\"col\" class=\"number\">b</th>")
        );
    }
}
