// SPDX-License-Identifier: MIT OR Apache-2.0

//! Which scanout it is, where the application does not say.

use std::ffi::OsString;
use std::io;
use std::path::Path;

use crate::lease::LeaseError;

const VARIABLE: &str = "HELIX_SCANOUT_ID";
/// In XDG_RUNTIME_DIR.
const FILE: &str = "helix-scanout-id";

/// What to tell who has no scanout id and could borrow none.
pub(super) fn not_lent(error: &LeaseError) -> String {
    format!(
        "which scanout? Set scanout-id or the environment's HELIX_SCANOUT_ID, have the session \
         write $XDG_RUNTIME_DIR/helix-scanout-id, or have one lent: {error}"
    )
}

/// The property, else the environment, else the file that a desktop's session has left; `None`
/// where one has to be borrowed. `environment` is `std::env::var_os`.
pub(super) fn find(
    property: i32,
    environment: impl Fn(&str) -> Option<OsString>,
) -> Result<Option<u16>, String> {
    if let Ok(id) = u16::try_from(property) {
        return Ok(Some(id));
    }
    if let Some(text) = environment(VARIABLE) {
        let from = format!("the environment's {VARIABLE}");
        return parse(&text.to_string_lossy(), &from).map(Some);
    }
    let Some(dir) = environment("XDG_RUNTIME_DIR") else {
        return Ok(None);
    };
    let path = Path::new(&dir).join(FILE);
    match std::fs::read_to_string(&path) {
        Ok(text) => parse(&text, &path.display().to_string()).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!(
            "read the scanout id from {}: {error} (scanout-id goes before it)",
            path.display()
        )),
    }
}

fn parse(text: &str, from: &str) -> Result<u16, String> {
    let text = text.trim();
    text.parse().map_err(|_| {
        format!("{from} is '{text}', which is no scanout id (scanout-id goes before it)")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find_with(property: i32, variable: Option<&str>, dir: &Path) -> Result<Option<u16>, String> {
        find(property, |name| match name {
            VARIABLE => variable.map(Into::into),
            "XDG_RUNTIME_DIR" => Some(dir.into()),
            other => panic!("{other} is nobody's business here"),
        })
    }

    #[test]
    fn the_property_goes_before_the_environment_and_that_before_the_file() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(find_with(-1, None, dir.path()), Ok(None));
        std::fs::write(dir.path().join(FILE), "3\n").unwrap();
        assert_eq!(find_with(-1, None, dir.path()), Ok(Some(3)));
        assert_eq!(find_with(-1, Some(" 2"), dir.path()), Ok(Some(2)));
        assert_eq!(find_with(0, Some("2"), dir.path()), Ok(Some(0)));
        assert_eq!(find(-1, |_| None), Ok(None));
    }

    #[test]
    fn what_is_no_id_is_an_error_that_says_where_it_stands() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "one", "-1", "65536"] {
            let error = find_with(-1, Some(text), dir.path()).unwrap_err();
            assert!(error.contains(VARIABLE), "{error}");
        }
        std::fs::write(dir.path().join(FILE), "Virtual-2").unwrap();
        let error = find_with(-1, None, dir.path()).unwrap_err();
        assert!(error.contains("helix-scanout-id is 'Virtual-2'"), "{error}");
        std::fs::write(dir.path().join(FILE), [0xff]).unwrap();
        let error = find_with(-1, None, dir.path()).unwrap_err();
        assert!(error.contains("read the scanout id"), "{error}");
    }
}
