//! Types of fields beside numbers and structures.

use std::ops::{Deref, DerefMut};

use crate::value::Number;
use crate::{Error, Fields, Value};

/// When a timer fires, in ns of the guest's virtual clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timer(pub i64);

impl Timer {
    /// Of a timer that does not run.
    pub const NOT_ARMED: Self = Self(-1);
}

impl Default for Timer {
    fn default() -> Self {
        Self::NOT_ARMED
    }
}

impl Value for Timer {
    const KIND: &'static str = "timer";

    fn pass(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        self.0.pass(fields)
    }
}

/// Bytes as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer<const N: usize>(pub [u8; N]);

impl<const N: usize> Default for Buffer<N> {
    fn default() -> Self {
        Self([0; N])
    }
}

impl<const N: usize> Value for Buffer<N> {
    const KIND: &'static str = "buffer";

    fn pass(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        fields.bytes(&mut self.0)
    }
}

impl<const N: usize> Deref for Buffer<N> {
    type Target = [u8; N];

    fn deref(&self) -> &[u8; N] {
        &self.0
    }
}

impl<const N: usize> DerefMut for Buffer<N> {
    fn deref_mut(&mut self) -> &mut [u8; N] {
        &mut self.0
    }
}

/// Bytes that once had a meaning: saved as zeros, passed over by a load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unused<const N: usize>;

impl<const N: usize> Value for Unused<N> {
    const KIND: &'static str = "unused_buffer";

    fn pass(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        fields.bytes(&mut [0; N])
    }
}

/// An array too long to be one of Rust's with a default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table<V, const N: usize>(Box<[V]>);

impl<V: Clone + Default, const N: usize> Default for Table<V, N> {
    fn default() -> Self {
        Self(vec![V::default(); N].into_boxed_slice())
    }
}

impl<V, const N: usize> Deref for Table<V, N> {
    type Target = [V];

    fn deref(&self) -> &[V] {
        &self.0
    }
}

impl<V, const N: usize> DerefMut for Table<V, N> {
    fn deref_mut(&mut self) -> &mut [V] {
        &mut self.0
    }
}

impl<V: Value, const N: usize> Value for Table<V, N> {
    const KIND: &'static str = V::KIND;

    fn pass(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        self.0.iter_mut().try_for_each(|value| value.pass(fields))
    }

    fn pass_named(&mut self, name: &'static str, fields: &mut Fields<'_>) -> Result<(), Error> {
        fields.array(name, &mut self.0)
    }
}

/// A number that belongs to how the device was made, and must be the same at both ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Same<N> {
    /// The number.
    pub value: N,
    /// This end has it; else any number is loaded, as by a tool that has no device.
    pub fixed: bool,
}

impl<N> Same<N> {
    /// What this end has.
    pub const fn new(value: N) -> Self {
        Self { value, fixed: true }
    }
}

impl<N: Number> Value for Same<N> {
    const KIND: &'static str = N::SAME;

    fn pass(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        let mut value = self.value;
        value.pass(fields)?;
        if self.fixed && value != self.value {
            return Err(fields.wrong(value, format_args!("{}, what this end has", self.value)));
        }
        self.value = value;
        Ok(())
    }
}

/// A number up to which this end has: of other versions, or of a table's entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AtMost<N> {
    /// The number.
    pub value: N,
    /// The largest that is loaded; `None`: any.
    pub limit: Option<N>,
}

impl<N> AtMost<N> {
    /// This, and nothing above it.
    pub const fn new(value: N) -> Self
    where
        N: Copy,
    {
        Self { value, limit: Some(value) }
    }
}

impl<N: Number> Value for AtMost<N> {
    const KIND: &'static str = N::AT_MOST;

    fn pass(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        let mut value = self.value;
        value.pass(fields)?;
        if let Some(limit) = self.limit
            && value > limit
        {
            return Err(fields.wrong(value, format_args!("at most {limit}")));
        }
        self.value = value;
        Ok(())
    }
}
