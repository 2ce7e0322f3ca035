// SPDX-License-Identifier: MIT OR Apache-2.0

//! Which CUDA device a DRM node belongs to.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{Error, driver};
use crate::egl;

/// The number of the CUDA device that is the GPU of a display.
///
/// By the PCI address of its node, which libcuda is asked about, so that it is libcuda's own number; by
/// `EGL_CUDA_DEVICE_NV` (L19) for a display without a node.
pub fn of_display(display: &egl::Display) -> Result<u32, Error> {
    of_node(display.node()).or_else(|error| display.cuda_device().ok_or(error))
}

/// The number of the CUDA device that is the GPU of a DRM node (render or primary): both are asked for
/// their PCI address.
fn of_node(node: &Path) -> Result<u32, Error> {
    let wanted = pci_address(node)?;
    for device in 0..driver::device_count()? {
        // A device that does not say where it is is not the one.
        if driver::pci_address(device).is_ok_and(|address| same(&address, &wanted)) {
            return Ok(device.unsigned_abs());
        }
    }
    Err(Error::Unavailable(format!(
        "no CUDA device is the GPU of {} (PCI {wanted})",
        node.display()
    )))
}

/// The PCI address of a node's device, as sysfs has it.
fn pci_address(node: &Path) -> Result<String, Error> {
    let unavailable = |text: String| Error::Unavailable(format!("{}: {text}", node.display()));
    let device = node
        .metadata()
        .map_err(|error| unavailable(error.to_string()))?
        .rdev();
    let (major, minor) = (libc::major(device), libc::minor(device));
    let link = PathBuf::from(format!("/sys/dev/char/{major}:{minor}/device"));
    let target = link
        .canonicalize()
        .map_err(|error| unavailable(format!("{}: {error}", link.display())))?;
    // A GPU is a PCI device, or something that sits on one, as virtio's do.
    let names = target
        .ancestors()
        .filter_map(|path| path.file_name()?.to_str());
    names
        .into_iter()
        .find(|name| parse(name).is_some())
        .map(str::to_lowercase)
        .ok_or_else(|| unavailable(format!("{} is no PCI device", target.display())))
}

/// Domain, bus, device and function. The two sides write the domain with different numbers of
/// digits.
fn parse(address: &str) -> Option<[u32; 4]> {
    let (rest, function) = address.rsplit_once('.')?;
    let mut parts = rest.splitn(3, ':');
    let mut next = || u32::from_str_radix(parts.next()?, 16).ok();
    let parts = [next()?, next()?, next()?];
    Some([parts[0], parts[1], parts[2], function.parse().ok()?])
}

fn same(one: &str, other: &str) -> bool {
    parse(one).is_some_and(|one| parse(other) == Some(one))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_the_same_however_their_domain_is_written() {
        assert!(same("00000000:65:00.0", "0000:65:00.0"));
        assert!(same("0000:0a:00.1", "0:0A:00.1"));
        assert!(!same("0000:65:00.0", "0000:65:00.1"));
        assert!(!same("virtio0", "virtio0"));
    }

    #[test]
    fn what_has_no_pci_device_says_so() {
        let error = pci_address(Path::new("/dev/null")).unwrap_err();
        assert!(error.to_string().starts_with("/dev/null: "), "{error}");
    }
}
