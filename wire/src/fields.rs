use crate::reader::{Reader, Stop, whole};
use crate::vmdesc::SUBSECTION;
use crate::{DeviceDescription, FieldDescription, Invalid, StructDescription};

/// Bytes with a layout of their own: the payload of a device section, a field of type `struct`, or
/// a subsection. Spec: docs/wire.md §3.3.
///
/// Nothing is looked at before it is asked for, and arrays are never spelled out, so the cost is
/// that of what the caller visits: a description can claim 2^60 elements in a few bytes.
///
/// ```
/// use multifd_wire::{Structure, Value, VmDescription};
///
/// let json = br#"{"devices": [{"name": "timer", "instance_id": 0, "vmsd_name": "timer", "version": 2,
///                              "fields": [{"name": "ticks", "type": "int64", "size": 8}]}]}"#;
/// let description = VmDescription::parse(json)?;
/// let contents = Structure::of_device(&description.devices[0], &[0, 0, 0, 0, 0, 0, 1, 0]).contents()?;
/// let ticks = &contents.fields[0];
/// assert_eq!((ticks.name(), ticks.value(ticks.bytes())), ("ticks", Value::Signed(256)));
/// # Ok::<(), multifd_wire::Invalid>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Structure<'a> {
    fields: &'a [FieldDescription],
    subsections: &'a [StructDescription],
    bytes: &'a [u8],
}

/// One level of a [`Structure`], in the order of its bytes.
#[derive(Clone, Debug)]
pub struct Contents<'a> {
    /// The fields.
    pub fields: Vec<Field<'a>>,
    /// The subsections, which follow the fields.
    pub subsections: Vec<Subsection<'a>>,
}

/// One field with its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Field<'a> {
    description: &'a FieldDescription,
    bytes: &'a [u8],
}

/// A subsection: there because something is not as usual, which its name tells.
#[derive(Clone, Copy, Debug)]
pub struct Subsection<'a> {
    /// Its full name, such as `cpu/xsave`.
    pub name: &'a str,
    /// Version of its layout.
    pub version: u32,
    /// What is in it.
    pub structure: Structure<'a>,
}

/// A run of equal elements of an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run<'a> {
    /// Index of the first of them.
    pub first: u64,
    /// How many there are, at least 1.
    pub count: u64,
    /// The bytes of one.
    pub element: &'a [u8],
}

/// What bytes mean where the type of the field says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    /// `bool`
    Bool(bool),
    /// Anything else: a buffer, a type written by code.
    Bytes(&'a [u8]),
    /// An empty place in an array of pointers.
    Null,
    /// A number of 1, 2, 4 or 8 bytes of an `int` type, or the expiry time of a `timer` in ns (-1:
    /// not armed).
    Signed(i64),
    /// A number of 1, 2, 4 or 8 bytes.
    Unsigned(u64),
}

/// What stands for a null pointer. Spec: docs/wire.md §3.3.
const NULL_POINTER: u8 = b'0';

impl<'a> Structure<'a> {
    /// The payload of a device section.
    pub fn of_device(device: &'a DeviceDescription, payload: &'a [u8]) -> Self {
        Self { fields: &device.fields, subsections: &device.subsections, bytes: payload }
    }

    /// All of its bytes.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Takes it apart by one level.
    ///
    /// # Errors
    /// The bytes are fewer or more than described, or no subsection is where one should be.
    pub fn contents(&self) -> Result<Contents<'a>, Invalid> {
        whole("fields of a device section", self.bytes, |r| {
            let field = |field| Field::read(field, r);
            let fields = self.fields.iter().map(field).collect::<Result<_, _>>()?;
            let subsection = |subsection| Subsection::read(subsection, r);
            let subsections = self.subsections.iter().map(subsection).collect::<Result<_, _>>()?;
            Ok(Contents { fields, subsections })
        })
    }
}

impl<'a> Field<'a> {
    fn read(description: &'a FieldDescription, r: &mut Reader<'a>) -> Result<Self, Stop> {
        let bytes = take(r, description.len(), &description.name)?;
        Ok(Self { description, bytes })
    }

    /// Name of the field.
    pub fn name(&self) -> &'a str {
        &self.description.name
    }

    /// Type of the field, such as `uint32`, `buffer`, `struct`.
    pub fn kind(&self) -> &'a str {
        &self.description.kind
    }

    /// Index in its array, where the elements are described one by one.
    pub fn index(&self) -> Option<u64> {
        self.description.index
    }

    /// Number of elements, where they are described all at once.
    pub fn array_len(&self) -> Option<u64> {
        self.description.array_len
    }

    /// All of its bytes.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The elements of an array, in runs of equal ones. A scalar field is its own only element.
    pub fn runs(&self) -> impl Iterator<Item = Run<'a>> + use<'a> {
        let count = self.array_len().unwrap_or(1);
        // The length is a multiple of the count; a count that does not fit is one of elements of no
        // length.
        let len = usize::try_from(count).ok().and_then(|count| self.bytes.len().checked_div(count));
        let mut rest = self.bytes;
        let mut first = 0;
        std::iter::from_fn(move || {
            let element = rest.get(..len.unwrap_or(0)).filter(|_| first < count)?;
            let equal = match element {
                [] => count,
                _ => rest.chunks_exact(element.len()).take_while(|next| *next == element).count() as u64,
            };
            let run = Run { first, count: equal, element };
            let used = element.len().checked_mul(usize::try_from(equal).unwrap_or(0)).unwrap_or(0);
            rest = rest.get(used..).unwrap_or_default();
            first += equal;
            Some(run)
        })
    }

    /// What is inside of an element, for the type `struct`.
    pub fn structure(&self, element: &'a [u8]) -> Option<Structure<'a>> {
        let inner = self.description.described_struct()?;
        Some(Structure { fields: &inner.fields, subsections: &inner.subsections, bytes: element })
    }

    /// The value of an element.
    pub fn value(&self, element: &'a [u8]) -> Value<'a> {
        let kind = self.kind();
        match (kind, element) {
            ("bool", [byte]) => return Value::Bool(*byte != 0),
            ("nullptr", [NULL_POINTER]) => return Value::Null,
            _ => {}
        }
        // `int32 equal`, `int32 le`: checks at the destination, the bytes are the same.
        let signed = kind.starts_with("int") || kind == "timer";
        match be_integer(element).filter(|_| !kind.ends_with("buffer")) {
            Some((value, sign_bits)) if signed => {
                Value::Signed((value << sign_bits).cast_signed() >> sign_bits)
            }
            Some((value, _)) => Value::Unsigned(value),
            None => Value::Bytes(element),
        }
    }
}

impl<'a> Subsection<'a> {
    /// A type byte, a counted name and a version come before the contents. Spec: docs/wire.md §3.3.
    fn read(description: &'a StructDescription, r: &mut Reader<'a>) -> Result<Self, Stop> {
        let wanted = &description.vmsd_name;
        let (kind, name, version) = (r.u8()?, r.cstr8()?, r.be32()?);
        if kind != SUBSECTION || name != wanted.as_bytes() {
            let seen = format!("type {kind:#04x}, name {}", name.escape_ascii());
            return Err(Invalid::new("subsection", seen, wanted).into());
        }
        let bytes = take(r, description.contents_len(), wanted)?;
        let structure =
            Structure { fields: &description.fields, subsections: &description.subsections, bytes };
        Ok(Self { name: wanted, version, structure })
    }
}

/// Takes as many bytes as a description says; `None` is a length that does not fit a u64.
fn take<'a>(r: &mut Reader<'a>, len: Option<u64>, name: &str) -> Result<&'a [u8], Stop> {
    let left = r.rest().len();
    match len.and_then(|len| usize::try_from(len).ok()) {
        Some(len) if len <= left => r.take(len),
        _ => {
            let seen = format!("{left} bytes are left for {name}");
            Err(Invalid::new("fields of a device section", seen, "as many as are described").into())
        }
    }
}

/// The number, and the bits above its sign bit in 64.
fn be_integer(bytes: &[u8]) -> Option<(u64, u32)> {
    match *bytes {
        [a] => Some((a.into(), 56)),
        [a, b] => Some((u16::from_be_bytes([a, b]).into(), 48)),
        [a, b, c, d] => Some((u32::from_be_bytes([a, b, c, d]).into(), 32)),
        _ => bytes.as_array().map(|bytes| (u64::from_be_bytes(*bytes), 0)),
    }
}

#[cfg(test)]
mod tests;
