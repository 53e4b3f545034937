//! What a field can be.

use std::fmt::{Debug, Display};

use crate::{Description, Device, Error, Fields};

/// What a field can be: a number, a bool, a structure, an array, or a type of your own whose bytes
/// are passed by [`Fields::bytes`].
pub trait Value {
    /// Its type, as QEMU's description names it: `uint32`, `struct`.
    const KIND: &'static str;
    /// Of a structure: its description.
    const PART: Option<&'static Description> = None;

    /// Saves or loads it.
    ///
    /// # Errors
    /// The bytes end, or are no such value.
    fn pass(&mut self, fields: &mut Fields<'_>) -> Result<(), Error>;

    /// Saves or loads it as a field of this name.
    ///
    /// # Errors
    /// As for [`Value::pass`].
    fn pass_named(&mut self, name: &'static str, fields: &mut Fields<'_>) -> Result<(), Error> {
        fields.single(name, self)
    }
}

/// A number, for checks against what this end has.
pub trait Number: Value + Copy + Debug + Display + PartialOrd {
    /// Its type where it must be the same on both ends.
    const SAME: &'static str;
    /// Its type where it must not be above what this end has.
    const AT_MOST: &'static str;
}

macro_rules! numbers {
    ($($type:ident $kind:literal)*) => {$(
        impl Value for $type {
            const KIND: &'static str = $kind;

            fn pass(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
                let mut bytes = self.to_be_bytes();
                fields.bytes(&mut bytes)?;
                *self = Self::from_be_bytes(bytes);
                Ok(())
            }
        }

        impl Number for $type {
            const SAME: &'static str = concat!($kind, " equal");
            const AT_MOST: &'static str = concat!($kind, " le");
        }
    )*};
}

numbers! {
    u8 "uint8" u16 "uint16" u32 "uint32" u64 "uint64"
    i8 "int8" i16 "int16" i32 "int32" i64 "int64"
}

impl Value for bool {
    const KIND: &'static str = "bool";

    fn pass(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        let mut byte = [u8::from(*self)];
        fields.bytes(&mut byte)?;
        *self = match byte {
            [0] => false,
            [1] => true,
            [other] => return Err(fields.wrong(format_args!("{other:#04x}"), "0 or 1")),
        };
        Ok(())
    }
}

impl<D: Device> Value for D {
    const KIND: &'static str = "struct";
    const PART: Option<&'static Description> = Some(&D::DESCRIPTION);

    fn pass(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        fields.part(self)
    }
}

impl<V: Value, const N: usize> Value for [V; N] {
    const KIND: &'static str = V::KIND;
    const PART: Option<&'static Description> = V::PART;

    fn pass(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        self.iter_mut().try_for_each(|value| value.pass(fields))
    }

    fn pass_named(&mut self, name: &'static str, fields: &mut Fields<'_>) -> Result<(), Error> {
        fields.array(name, self)
    }
}
