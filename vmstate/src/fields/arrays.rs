//! Arrays, lists and pointers.

use super::{Fields, Step};
use crate::{Description, Error, Value};

/// Before each element of a list, and behind the last.
const MORE: u8 = 1;
const NO_MORE: u8 = 0;
/// Stands for a null pointer in an array of pointers.
const NULL_POINTER: u8 = b'0';

impl Fields<'_> {
    /// An array whose length both sides know.
    ///
    /// # Errors
    /// As for [`Fields::field`].
    pub fn array<V: Value>(&mut self, name: &'static str, values: &mut [V]) -> Result<(), Error> {
        self.folded(name, |this| {
            values.iter_mut().enumerate().try_for_each(|(index, value)| this.element(name, index, value))
        })
    }

    /// An array whose length is another field, which comes before it.
    ///
    /// # Errors
    /// As for [`Fields::field`]; or the length is not what is to be saved, or more than there are
    /// bytes for.
    pub fn counted<V: Value + Default>(
        &mut self,
        name: &'static str,
        values: &mut Vec<V>,
        len: impl TryInto<usize>,
    ) -> Result<(), Error> {
        let len = len.try_into().unwrap_or(usize::MAX);
        match self.left() {
            // Every element has a byte or more, so no length makes this allocate more elements
            // than there are bytes.
            Some(left) if len > left.len() => {
                let left = left.len();
                return self.within(Step::Name(name), |this| {
                    Err(this.wrong(format_args!("{left} bytes are left"), format_args!("{len} elements")))
                });
            }
            Some(_) => values.resize_with(len, V::default),
            None if len != values.len() => {
                return self.within(Step::Name(name), |this| {
                    Err(this
                        .wrong(format_args!("{} elements", values.len()), format_args!("{len}, their count")))
                });
            }
            None => {}
        }
        self.array(name, values)
    }

    /// Bytes whose length is another field, which comes before them.
    ///
    /// # Errors
    /// As for [`Fields::counted`].
    pub fn buffer(
        &mut self,
        name: &'static str,
        bytes: &mut Vec<u8>,
        len: impl TryInto<usize>,
    ) -> Result<(), Error> {
        let len = len.try_into().unwrap_or(usize::MAX);
        self.noted(Step::Name(name), name, None, "buffer", None, |this| {
            match this.left() {
                Some(left) if len > left.len() => {
                    return Err(this.wrong(format_args!("{} bytes are left", left.len()), len));
                }
                Some(_) => bytes.resize(len, 0),
                None if len != bytes.len() => {
                    return Err(
                        this.wrong(format_args!("{} bytes", bytes.len()), format_args!("{len}, their count"))
                    );
                }
                None => {}
            }
            this.bytes(bytes)
        })
    }

    /// An array of pointers, of which some are null: the same ones on both sides.
    ///
    /// # Errors
    /// As for [`Fields::field`]; or there is something where there should be a null pointer.
    pub fn pointers<V: Value>(&mut self, name: &'static str, values: &mut [Option<V>]) -> Result<(), Error> {
        self.folded(name, |this| {
            values.iter_mut().enumerate().try_for_each(|(index, value)| match value {
                Some(value) => this.element(name, index, value),
                None => this.noted(Step::Index(index), name, Some(index as u64), "nullptr", None, |this| {
                    let mut byte = [NULL_POINTER];
                    this.bytes(&mut byte)?;
                    match byte {
                        [NULL_POINTER] => Ok(()),
                        [other] => Err(this.wrong(format_args!("{other:#04x}"), "0x30, a null pointer")),
                    }
                }),
            })
        })
    }

    /// A list: before each element a one, and a zero at the end.
    ///
    /// # Errors
    /// As for [`Fields::field`]; or a byte that is neither.
    pub fn list<V: Value + Default>(&mut self, name: &'static str, values: &mut Vec<V>) -> Result<(), Error> {
        self.list_of(name, values, V::default)
    }

    /// A list whose elements need something to be made.
    pub(crate) fn list_of<V: Value>(
        &mut self,
        name: &'static str,
        values: &mut Vec<V>,
        make: impl Fn() -> V,
    ) -> Result<(), Error> {
        self.noted(Step::Name(name), name, None, "qtailq", None, |this| this.elements(values, make))
    }

    /// A tree in the order of its keys: their number, and then as a list.
    ///
    /// # Errors
    /// As for [`Fields::list`]; or the number is another.
    pub fn tree<V: Value + Default>(&mut self, name: &'static str, values: &mut Vec<V>) -> Result<(), Error> {
        self.noted(Step::Name(name), name, None, "gtree", None, |this| {
            let too_many = |this: &Self, len| this.wrong(format_args!("{len} nodes"), "at most 4294967295");
            let mut count = u32::try_from(values.len()).map_err(|_| too_many(this, values.len()))?;
            count.pass(this)?;
            this.elements(values, V::default)?;
            if u32::try_from(values.len()).is_ok_and(|len| len == count) {
                return Ok(());
            }
            Err(this.wrong(format_args!("{} nodes", values.len()), format_args!("{count}, their number")))
        })
    }

    /// Elements of an array whose fields are not theirs alone.
    pub(crate) fn each<V>(
        &mut self,
        name: &'static str,
        about: &'static Description,
        values: &mut [V],
        mut pass: impl FnMut(usize, &mut V, &mut Self) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.folded(name, |this| {
            values.iter_mut().enumerate().try_for_each(|(index, value)| {
                let (step, number) = (Step::Index(index), Some(index as u64));
                this.noted(step, name, number, "struct", Some(about), |this| pass(index, value, this))
            })
        })
    }

    fn elements<V: Value>(&mut self, values: &mut Vec<V>, make: impl Fn() -> V) -> Result<(), Error> {
        if !self.is_load() {
            for (index, value) in values.iter_mut().enumerate() {
                self.within(Step::Index(index), |this| {
                    this.bytes(&mut [MORE])?;
                    value.pass(this)
                })?;
            }
            return self.bytes(&mut [NO_MORE]);
        }
        values.clear();
        loop {
            let index = values.len();
            let more = self.within(Step::Index(index), |this| {
                let mut more = 0_u8;
                more.pass(this)?;
                match more {
                    NO_MORE => Ok(None),
                    MORE => {
                        let mut value = make();
                        value.pass(this)?;
                        Ok(Some(value))
                    }
                    other => Err(this.wrong(format_args!("{other:#04x}"), "1, an element, or 0, the end")),
                }
            })?;
            match more {
                Some(value) => values.push(value),
                None => break,
            }
        }
        Ok(())
    }
}
