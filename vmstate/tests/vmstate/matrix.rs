//! Releases of one device, each to each.

use multifd_vmstate::{Device, Hook, layout, load, save};

/// The first release.
mod v1 {
    use super::*;

    layout! {
        /// A watchdog.
        pub struct Watchdog = "watchdog", version 1 {
            seconds: u32;
        }
    }
}

/// A field more, which older state does not have.
mod v2 {
    use super::*;

    layout! {
        /// A watchdog.
        pub struct Watchdog = "watchdog", version 2, minimum 1 {
            seconds: u32;
            strikes: u8 => since 2;
        }
    }
}

/// A subsection, which is only there if it is used: the version stays.
mod v3 {
    use super::*;

    layout! {
        /// A watchdog.
        pub struct Watchdog = "watchdog", version 2, minimum 1 {
            seconds: u32;
            strikes: u8 => since 2;
        }
        subsections {
            warning: Warning;
        }
    }

    layout! {
        /// Before the last strike.
        pub struct Warning = "watchdog/warning", version 1 {
            seconds: u32;
        }
    }
}

/// Version 1 is no longer read.
mod v4 {
    use super::*;

    layout! {
        /// A watchdog.
        pub struct Watchdog = "watchdog", version 3, minimum 2 {
            seconds: u32;
            strikes: u8;
            action: u8 => since 3;
        }
        subsections {
            warning: v3::Warning;
        }
    }
}

/// What comes of the state of one release in another: the error, if any.
fn moved<A: Device, B: Device>(mut from: A, to: &mut B) -> Result<(), String> {
    let bytes = save(&mut from).unwrap().bytes;
    load(to, A::DESCRIPTION.version, &bytes).map_err(|error| error.to_string())
}

#[test]
fn state_of_each_release_in_each_other() {
    let (mut one, mut two, mut three, mut four) = (
        v1::Watchdog { seconds: 30 },
        v2::Watchdog { seconds: 31, strikes: 2 },
        v3::Watchdog { seconds: 32, strikes: 3, warning: None },
        v4::Watchdog { seconds: 33, strikes: 4, action: 5, warning: None },
    );
    let warned = v3::Watchdog { warning: Some(v3::Warning { seconds: 7 }), ..three.clone() };
    let too_new = |version, expected: &str| Err(format!("watchdog: version {version}, expected {expected}"));

    assert_eq!(moved(two.clone(), &mut one), too_new(2, "1"));
    assert_eq!(moved(four.clone(), &mut one), too_new(3, "1"));
    assert_eq!(one, v1::Watchdog { seconds: 30 });

    assert_eq!(moved(one.clone(), &mut two), Ok(()));
    assert_eq!(two, v2::Watchdog { seconds: 30, strikes: 2 }, "what it did not have stays");
    assert_eq!(moved(three.clone(), &mut two), Ok(()));
    assert_eq!(two, v2::Watchdog { seconds: 32, strikes: 3 });
    let unknown =
        "watchdog: watchdog/warning: a subsection that is unknown here, expected one of a description";
    assert_eq!(moved(warned.clone(), &mut two), Err(unknown.to_owned()));
    assert_eq!(two, v2::Watchdog { seconds: 32, strikes: 3 }, "nothing is half loaded");
    assert_eq!(moved(four.clone(), &mut two), too_new(3, "1..=2"));

    assert_eq!(moved(warned.clone(), &mut three), Ok(()));
    assert_eq!(three, warned);
    assert_eq!(moved(two.clone(), &mut three), Ok(()));
    assert_eq!(three.warning, None, "a stream without the subsection has none");

    assert_eq!(moved(one, &mut four), too_new(1, "2..=3"));
    assert_eq!(moved(warned, &mut four), Ok(()));
    assert_eq!((four.seconds, four.strikes, four.action), (32, 3, 5));
    assert!(four.warning.is_some());
}

/// A device that keeps its state in another form, and looks at it as a whole.
#[derive(Clone, Debug, Default, PartialEq)]
struct Lamp {
    hooks: Vec<&'static str>,
    on_since: u64,
    saved: u32,
    limit: u32,
}

impl Device for Lamp {
    const DESCRIPTION: multifd_vmstate::Description = multifd_vmstate::Description::new("lamp", 1);

    fn fields(&mut self, fields: &mut multifd_vmstate::Fields<'_>) -> Result<(), multifd_vmstate::Error> {
        self.hooks.push("fields");
        fields.field("saved", &mut self.saved)
    }

    fn pre_save(&mut self) -> Hook {
        self.hooks.push("pre_save");
        self.saved = u32::try_from(self.on_since).map_err(|_| "on for too long".to_owned())?;
        Ok(())
    }

    fn post_save(&mut self) {
        self.hooks.push("post_save");
    }

    fn pre_load(&mut self) -> Hook {
        self.hooks.push("pre_load");
        Ok(())
    }

    fn post_load(&mut self, version: u32) -> Hook {
        self.hooks.push("post_load");
        if self.saved > self.limit {
            return Err(format!(
                "version {version} was on for {}, at most {} is known",
                self.saved, self.limit
            ));
        }
        self.on_since = self.saved.into();
        Ok(())
    }
}

#[test]
fn hooks_run_in_order_and_a_refusal_leaves_the_device_as_it_was() {
    let mut lamp = Lamp { on_since: 9, limit: 10, ..Lamp::default() };
    let bytes = save(&mut lamp).unwrap().bytes;
    assert_eq!(
        (lamp.hooks.as_slice(), bytes.as_slice()),
        (&["pre_save", "fields", "post_save"][..], &[0, 0, 0, 9][..])
    );

    let mut here = Lamp { limit: 10, ..Lamp::default() };
    load(&mut here, 1, &bytes).unwrap();
    assert_eq!((here.hooks.as_slice(), here.on_since), (&["pre_load", "fields", "post_load"][..], 9));

    let before = here.clone();
    let error = load(&mut here, 1, &[0, 0, 0, 11]).unwrap_err();
    assert_eq!(error.to_string(), "lamp: post_load: version 1 was on for 11, at most 10 is known");
    assert_eq!(here, before);
    assert_eq!(
        load(&mut here, 1, &[0, 0]).unwrap_err().to_string(),
        "lamp: saved: 2 bytes are left, expected 4"
    );
    let error = load(&mut here, 1, &[0, 0, 0, 1, 1]).unwrap_err();
    assert_eq!(error.to_string(), "lamp: 1 bytes are left behind the fields, expected none");
    assert_eq!(here, before);

    let mut lamp = Lamp { on_since: 1 << 40, ..Lamp::default() };
    assert_eq!(save(&mut lamp).unwrap_err().to_string(), "lamp: pre_save: on for too long");
}
