// SPDX-License-Identifier: MIT OR Apache-2.0

//! A table of functions, looked up in a library by name.

use libloading::Library;

/// Declares a struct of function pointers and its constructor `load`, which fails with the name of
/// the function that the library lacks.
macro_rules! symbols {
    ($(#[$doc:meta])* pub struct $table:ident {
        $($(#[$about:meta])* fn $symbol:ident as $name:ident($($argument:ty),*) $(-> $result:ty)?;)*
    }) => {
        $(#[$doc])*
        pub struct $table {
            $($(#[$about])* pub $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        impl $table {
            /// Looks every function up.
            ///
            /// # Safety
            ///
            /// The functions of these names must have these types, and the library must never be
            /// unloaded.
            pub unsafe fn load(library: &libloading::Library) -> Result<Self, String> {
                $(
                    // SAFETY: the caller vouches for the type, and that the function stays.
                    let $name = unsafe { library.get(concat!(stringify!($symbol), "\0").as_bytes()) }
                        .map(|symbol| *symbol)
                        .map_err(|_| concat!("has no ", stringify!($symbol)).to_owned())?;
                )*
                Ok(Self { $($name),* })
            }
        }
    };
}
pub(super) use symbols;

/// Loads a library for good: what it gives away (threads, types of GObject) points into it.
pub(super) fn load_for_ever(name: &str) -> Result<&'static Library, String> {
    // SAFETY: the names that are asked for are those of the platform's own libraries, whose
    // initialisers need nothing of us.
    let library = unsafe { Library::new(name) }
        .map_err(|error| format!("{name} cannot be loaded: {error}"))?;
    Ok(Box::leak(Box::new(library)))
}
