//! The fields of a device section, as far as they are shown.

use multifd_wire::{Field, Invalid, Run, Structure, Value};
use serde::Serialize;

/// Elements of an array that are shown, equal neighbours as one.
const MAX_RUNS: usize = 16;

/// Bytes of a buffer that are shown.
pub(super) const MAX_BYTES: usize = 16;

/// Fields of all devices together. A guest with 1024 vCPUs has about 200 000.
const MAX_FIELDS: usize = 300_000;

/// Shortest text that is shown as one: two printable bytes in a row say nothing.
const MIN_TEXT: usize = 4;

/// How many fields may still be shown. Descriptions of a few bytes can tell of very many.
pub(super) struct Budget(usize);

#[derive(Default, Serialize)]
pub(super) struct StructureView {
    pub(super) fields: Vec<FieldView>,
    pub(super) subsections: Vec<SubsectionView>,
}

#[derive(Serialize)]
pub(super) struct SubsectionView {
    pub(super) name: String,
    pub(super) version: u32,
    #[serde(flatten)]
    pub(super) structure: StructureView,
}

#[derive(Serialize)]
pub(super) struct FieldView {
    pub(super) name: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    /// Bytes, of all elements together.
    pub(super) size: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) index: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) array_len: Option<u64>,
    #[serde(flatten)]
    pub(super) content: Content,
}

#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum Content {
    Array { elements: Vec<ElementView>, omitted_elements: u64 },
    Scalar(Scalar),
    Structure(StructureView),
}

/// `count` equal elements of an array, from index `first` on.
#[derive(Serialize)]
pub(super) struct ElementView {
    pub(super) first: u64,
    pub(super) count: u64,
    #[serde(flatten)]
    pub(super) content: Content,
}

#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum Scalar {
    Bool {
        value: bool,
    },
    Bytes {
        /// The first bytes, in hexadecimal.
        bytes: String,
        /// All of them, where they are text that ends in zeros.
        #[serde(skip_serializing_if = "Option::is_none")]
        text: Option<String>,
    },
    Null {
        value: (),
    },
    Signed {
        value: i64,
        hex: String,
    },
    Unsigned {
        value: u64,
        hex: String,
    },
}

impl Default for Budget {
    fn default() -> Self {
        Self(MAX_FIELDS)
    }
}

/// Shows a structure, and says why not all of it, if so.
pub(super) fn view(structure: Structure<'_>, budget: &mut Budget) -> (StructureView, Option<String>) {
    match structure_view(structure, budget) {
        Ok(view) if budget.0 > 0 => (view, None),
        Ok(view) => (view, Some(format!("there are more than {MAX_FIELDS} fields, the rest is left out"))),
        Err(error) => {
            (StructureView::default(), Some(format!("the description does not fit the section: {error}")))
        }
    }
}

fn structure_view(structure: Structure<'_>, budget: &mut Budget) -> Result<StructureView, Invalid> {
    let contents = structure.contents()?;
    let mut view = StructureView::default();
    for field in &contents.fields {
        if budget.0 == 0 {
            return Ok(view);
        }
        view.fields.push(field_view(field, budget)?);
    }
    for subsection in &contents.subsections {
        view.subsections.push(SubsectionView {
            name: subsection.name.to_owned(),
            version: subsection.version,
            structure: structure_view(subsection.structure, budget)?,
        });
    }
    Ok(view)
}

fn field_view(field: &Field<'_>, budget: &mut Budget) -> Result<FieldView, Invalid> {
    let content = match field.array_len() {
        None => element_view(field, field.bytes(), budget)?,
        Some(len) => array_view(field, len, budget)?,
    };
    Ok(FieldView {
        name: field.name().to_owned(),
        kind: field.kind().to_owned(),
        size: field.bytes().len(),
        index: field.index(),
        array_len: field.array_len(),
        content,
    })
}

fn array_view(field: &Field<'_>, len: u64, budget: &mut Budget) -> Result<Content, Invalid> {
    let mut elements = Vec::new();
    let mut shown = 0;
    for Run { first, count, element } in field.runs().take(MAX_RUNS) {
        if budget.0 == 0 {
            break;
        }
        elements.push(ElementView { first, count, content: element_view(field, element, budget)? });
        shown = first + count;
    }
    Ok(Content::Array { elements, omitted_elements: len - shown })
}

fn element_view(field: &Field<'_>, element: &[u8], budget: &mut Budget) -> Result<Content, Invalid> {
    budget.0 = budget.0.saturating_sub(1);
    if let Some(structure) = field.structure(element) {
        return structure_view(structure, budget).map(Content::Structure);
    }
    Ok(Content::Scalar(scalar(field, element)))
}

/// The value of an element that is no structure.
pub(super) fn scalar(field: &Field<'_>, element: &[u8]) -> Scalar {
    let hex = |digits: usize, value: u64| format!("{value:#0width$x}", width = digits + 2);
    let digits = element.len() * 2;
    match field.value(element) {
        Value::Bool(value) => Scalar::Bool { value },
        Value::Bytes(bytes) => Scalar::Bytes { bytes: hex_of(bytes), text: text_of(bytes) },
        Value::Null => Scalar::Null { value: () },
        Value::Signed(value) => {
            let bits = u32::try_from(element.len() * 8).unwrap_or(u64::BITS);
            let unsigned = value.cast_unsigned() & (u64::MAX >> (u64::BITS - bits.clamp(1, u64::BITS)));
            Scalar::Signed { value, hex: hex(digits, unsigned) }
        }
        Value::Unsigned(value) => Scalar::Unsigned { value, hex: hex(digits, value) },
    }
}

pub(super) fn hex_of(bytes: &[u8]) -> String {
    let digits = bytes.iter().take(MAX_BYTES).map(|byte| format!("{byte:02x}"));
    let more = (bytes.len() > MAX_BYTES).then(|| "...".to_owned());
    digits.chain(more).collect::<Vec<_>>().join(" ")
}

/// Printable text with nothing but zeros behind it, as run states and names are.
fn text_of(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().rposition(|byte| *byte != 0)? + 1;
    let text = std::str::from_utf8(bytes.get(..end)?).ok()?;
    let printable =
        text.len() >= MIN_TEXT && text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic());
    printable.then(|| text.to_owned())
}
