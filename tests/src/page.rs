//! What the page that `multifd tune --html` writes must be in a browser.

use std::path::Path;

use serde_json::Value;

use crate::browser::{Browser, Screen};
use crate::{During, Failure, Outcome};

/// A small phone, a tablet at the width where the drawings change, and a desk.
const SCREENS: [(u32, u32, bool); 4] =
    [(360, 740, true), (412, 915, true), (720, 1000, false), (1280, 800, false)];

/// Looks at a page on all screens, light and dark, and gives everything that is wrong with it.
/// `plots` is how many it has.
///
/// # Errors
/// Naming what is wrong, and on which screen.
pub fn check(page: &Path, plots: u64) -> Outcome {
    let mut browser = Browser::spawn()?;
    let mut wrong = Vec::new();
    for (width, height, phone) in SCREENS {
        for dark in [false, true] {
            let screen = Screen { width, height, phone, dark };
            let name = format!("{width} pixels, {}", if dark { "dark" } else { "light" });
            let found = look(&mut browser, page, screen, plots).during(&name)?;
            wrong.extend(found.into_iter().map(|what| format!("{name}: {what}")));
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(Failure::new(wrong.join("\n"))) }
}

fn look(browser: &mut Browser, page: &Path, screen: Screen, plots: u64) -> Outcome<Vec<String>> {
    browser.open(page, screen)?;
    let mut seen = browser.evaluate(include_str!("page.js"))?;
    let mut wrong = Vec::new();
    let found = seen.get_mut("wrong").map(Value::take).unwrap_or_default();
    wrong.extend(found.as_array().into_iter().flatten().map(ToString::to_string));
    let number = |name: &str| seen.get(name).and_then(Value::as_u64).unwrap_or_default();
    if number("width") != u64::from(screen.width) {
        wrong.push(format!("laid out for {} pixels", number("width")));
    }
    if number("plots") != plots {
        wrong.push(format!("{} plots are shown, expected {plots}", number("plots")));
    }
    // So that nothing is right because nothing was looked at.
    if number("texts") < 20 {
        wrong.push(format!("only {} texts are shown", number("texts")));
    }
    wrong.extend(browser.complaints());
    let others = browser.requests().into_iter().filter(|address| !own(address, page));
    wrong.extend(others.map(|address| format!("asked for {address}")));
    Ok(wrong)
}

/// The page itself, or an address that holds its own content.
fn own(address: &str, page: &Path) -> bool {
    let file = page.file_name().unwrap_or_default().to_string_lossy();
    address.starts_with("data:") || (address.starts_with("file://") && address.ends_with(file.as_ref()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Scratch, skip_without_browser};

    /// Everything that is looked for, once.
    const BAD: &str = r##"<!DOCTYPE html><html><head><meta name="viewport" content="width=device-width"></head>
        <body style="background: #fff"><p style="width: 3000px">wide</p><p style="color: #999">pale</p>
        <p style="font-size: 9px">small</p><img src="missing.png">
        <svg viewBox="0 0 300 100" width="300" height="100"><title>plot</title>
        <text x="10" y="50">one</text><text x="14" y="52">other</text><text x="290" y="90">outside</text>
        <rect width="80" height="20" fill="#000"/><text x="4" y="15">dark</text></svg>
        <script>console.error("oh no")</script></body></html>"##;

    #[test]
    fn what_is_wrong_with_a_page_is_found() -> Outcome {
        skip_without_browser!();
        let scratch = Scratch::new()?;
        let page = scratch.path("bad.html");
        std::fs::write(&page, BAD)?;
        let wrong = check(&page, 2).unwrap_err().to_string();
        let light: Vec<_> = wrong.lines().filter(|line| line.starts_with("1280 pixels, light")).collect();
        for expected in [
            "off the screen: P",
            "the screen has 1280",
            "of P \\\"pale",
            "9px: P",
            "missing.png",
            "one\\\" over text \\\"other",
            "out of the drawing: text \\\"outside",
            "contrast 1.00 of text \\\"dark",
            "oh no",
            "1 plots are shown, expected 2",
        ] {
            assert!(light.iter().any(|line| line.contains(expected)), "{expected} in {light:#?}");
        }
        assert!(wrong.contains("1280 pixels, dark: \"the background of the dark page"), "{wrong}");
        Ok(())
    }
}
