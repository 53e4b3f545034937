/// Makes a structure and its description in one: each field is saved and loaded in the order in
/// which it stands.
///
/// `as` gives a field another name than Rust's, `=> since N` says from which version on it is
/// there. Subsections are `Option`s of structures of their own. What needs a hook, a count or a
/// rule implements [`Device`](crate::Device) itself.
///
/// ```
/// use multifd_vmstate::{Timer, layout, save};
///
/// layout! {
///     /// A watchdog.
///     pub struct Watchdog = "watchdog", version 2, minimum 1 {
///         /// Seconds.
///         timeout: u32;
///         expiry as "timer.expiry": Timer;
///         strikes: u8 => since 2;
///     }
///     subsections {
///         pretimeout: Pretimeout;
///     }
/// }
///
/// layout! {
///     /// Only of a guest that has asked for it.
///     pub struct Pretimeout = "watchdog/pretimeout", version 1 {
///         seconds: u32;
///     }
/// }
///
/// let mut watchdog = Watchdog { timeout: 30, strikes: 1, ..Watchdog::default() };
/// assert_eq!(save(&mut watchdog)?.bytes.len(), 4 + 8 + 1);
/// # Ok::<(), multifd_vmstate::Error>(())
/// ```
#[macro_export]
macro_rules! layout {
    (
        $(#[$meta:meta])*
        pub struct $Name:ident = $name:literal, version $version:literal $(, minimum $minimum:literal)? {
            $(
                $(#[$field_meta:meta])*
                $field:ident $(as $field_name:literal)? : $type:ty $(=> since $since:literal)?;
            )*
        }
        $(subsections { $($(#[$sub_meta:meta])* $sub:ident : $Sub:ty;)* })?
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        #[allow(missing_docs, reason = "fields have the names that QEMU's description gives them")]
        pub struct $Name {
            $($(#[$field_meta])* pub $field: $type,)*
            $($($(#[$sub_meta])* pub $sub: Option<$Sub>,)*)?
        }

        impl $crate::Device for $Name {
            const DESCRIPTION: $crate::Description =
                $crate::Description::new($name, $version)$(.minimum($minimum))?;

            fn fields(&mut self, fields: &mut $crate::Fields<'_>) -> ::core::result::Result<(), $crate::Error> {
                $(
                    $crate::layout!(
                        @pass fields, $crate::layout!(@name $field $($field_name)?), &mut self.$field
                        $(, since $since)?
                    )?;
                )*
                let _ = fields;
                Ok(())
            }

            $(
                fn pre_load(&mut self) -> $crate::Hook {
                    $(self.$sub = None;)*
                    Ok(())
                }

                fn subsections(
                    &mut self,
                    subsections: &mut $crate::Subsections<'_, '_>,
                ) -> ::core::result::Result<(), $crate::Error> {
                    $(subsections.optional(&mut self.$sub)?;)*
                    Ok(())
                }
            )?
        }
    };
    (@name $field:ident) => { stringify!($field) };
    (@name $field:ident $name:literal) => { $name };
    (@pass $fields:ident, $name:expr, $value:expr) => { $fields.field($name, $value) };
    (@pass $fields:ident, $name:expr, $value:expr, since $since:literal) => {
        $fields.since($since, $name, $value)
    };
}
