//! What a device says of its state, and saving and loading one.

use multifd_wire::{DeviceDescription, StructDescription};

use crate::fields::{Fields, Subsections};
use crate::{Description, Error};

/// What a hook returns: the reason for a refusal, in words for an operator.
pub type Hook = Result<(), String>;

/// A device, a part of one, or a subsection: its state in versions.
///
/// [`Device::fields`] is written once and run for both directions: saving reads the fields, loading
/// sets them, and while it saves it notes the names and types for the stream's vmdescription.
/// Whatever is in it is at the same place in the bytes.
///
/// What is not in a field is left as it is by a load, hence `Clone`: state is loaded into a copy,
/// which takes the device's place once everything is well.
pub trait Device: Clone {
    /// Name and versions.
    const DESCRIPTION: Description;

    /// The fields, in the order of their bytes.
    ///
    /// # Errors
    /// What `fields` says: `?` after each.
    fn fields(&mut self, fields: &mut Fields<'_>) -> Result<(), Error>;

    /// State that is only there if it is not as usual, behind the fields. A reader that does not
    /// know a subsection refuses it, so that one says: a reader has to know this.
    ///
    /// # Errors
    /// What `subsections` says: `?` after each.
    fn subsections(&mut self, subsections: &mut Subsections<'_, '_>) -> Result<(), Error> {
        let _ = subsections;
        Ok(())
    }

    /// Before the fields are saved: puts state into them that is kept in another form.
    ///
    /// # Errors
    /// The reason why it cannot be saved now.
    fn pre_save(&mut self) -> Hook {
        Ok(())
    }

    /// After all was saved, also if it failed.
    fn post_save(&mut self) {}

    /// Before the fields are loaded: sets what older versions did not have.
    ///
    /// # Errors
    /// The reason why nothing can be loaded now.
    fn pre_load(&mut self) -> Hook {
        Ok(())
    }

    /// After fields and subsections were loaded, those of the parts first: checks them together and
    /// derives what is kept in another form. `version` is that of the state.
    ///
    /// # Errors
    /// What is wrong with the state. The device is then as it was before.
    fn post_load(&mut self, version: u32) -> Hook {
        let _ = version;
        Ok(())
    }

    /// Whether there is state to be saved now. Of a whole device: without, it has no section.
    fn needed(&self) -> bool {
        true
    }

    /// The guest was asked to let go of the device and has not done so yet: it must not be saved
    /// before.
    fn unplug_pending(&self) -> bool {
        false
    }
}

/// The saved state of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// The payload of its section.
    pub bytes: Vec<u8>,
    /// What the payload consists of.
    pub layout: StructDescription,
}

impl Saved {
    /// The layout, as the stream's vmdescription lists it for a section of this name.
    pub fn describe(&self, name: &str, instance: u32) -> DeviceDescription {
        let StructDescription { vmsd_name, version, fields, subsections } = self.layout.clone();
        DeviceDescription {
            name: name.to_owned(),
            instance_id: instance,
            vmsd_name: Some(vmsd_name),
            version: Some(version),
            size: None,
            fields,
            subsections,
        }
    }
}

/// Saves a device.
///
/// # Errors
/// The device cannot be saved, or a field is not as it should be.
pub fn save<D: Device>(device: &mut D) -> Result<Saved, Error> {
    let about = &D::DESCRIPTION;
    if let Some(reason) = about.unmigratable {
        return Err(Error::said(about.name, "", format!("cannot be saved: {reason}")));
    }
    if device.unplug_pending() {
        let text = "cannot be saved while the guest has not let go of it".to_owned();
        return Err(Error::said(about.name, "", text));
    }
    let mut fields = Fields::saving(about);
    fields.contents(device)?;
    Ok(fields.into_saved())
}

/// Loads a device from the payload of its section, all of which it must be.
///
/// # Errors
/// A version that is too old or too new, bytes that do not fit the description, a subsection that
/// is unknown, a value that is refused. The device is then untouched.
pub fn load<D: Device>(device: &mut D, version: u32, payload: &[u8]) -> Result<(), Error> {
    *device = loaded(device, version, payload)?;
    Ok(())
}

/// The device as it would be after [`load`].
pub(crate) fn loaded<D: Device>(device: &D, version: u32, payload: &[u8]) -> Result<D, Error> {
    let about = &D::DESCRIPTION;
    if !about.reads(version) {
        let Description { name, minimum, version: newest, .. } = about;
        let seen = format_args!("version {version}");
        return Err(match minimum == newest {
            true => Error::new(name, "", seen, newest),
            false => Error::new(name, "", seen, format_args!("{minimum}..={newest}")),
        });
    }
    let mut new = device.clone();
    let mut fields = Fields::loading(about, version, payload);
    fields.contents(&mut new)?;
    fields.end()?;
    Ok(new)
}
