// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pictures in DMA-BUFs: as they are for who has a GPU, row by row for who has none.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::libc::c_void;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::statfs::{FsType, fstatfs};

use crate::error::Error;
use crate::format::PixelFormat;
use crate::picture::{Layout, check_size};

/// What `fstatfs` says of a DMA-BUF (`DMA_BUF_MAGIC` in linux/magic.h).
const DMA_BUF_MAGIC: FsType = FsType(0x444d_4142);

/// `DRM_FORMAT_MOD_LINEAR` of drm_fourcc.h.
pub(crate) const LINEAR: u64 = 0;

/// `DRM_FORMAT_MOD_INVALID`: nobody says how the pixels lie.
const INVALID: u64 = 0x00ff_ffff_ffff_ffff;

/// The exporter of pages of a memfd, as the kernel calls it (`exp_name` in its
/// drivers/dma-buf/udmabuf.c).
const UDMABUF: &str = "udmabuf";

/// The modifier of a picture in these planes. Where QEMU does not know it, memory that is of no GPU is
/// linear: that of a guest's blob resources, which QEMU makes so, and that of a software renderer's textures.
pub(crate) fn known_modifier(modifier: u64, planes: &[Plane]) -> u64 {
    let plain = |plane: &Plane| plane.exporter().as_deref() == Some(UDMABUF);
    if modifier == INVALID && planes.iter().all(plain) {
        return LINEAR;
    }
    modifier
}

nix::ioctl_write_ptr!(dma_buf_sync, b'b', 0, u64);
/// `DMA_BUF_SYNC_START | DMA_BUF_SYNC_READ` (linux/dma-buf.h).
const SYNC_START_READ: u64 = 1;
/// `DMA_BUF_SYNC_END | DMA_BUF_SYNC_READ`.
const SYNC_END_READ: u64 = 4 | 1;

/// A picture in DMA-BUFs.
#[derive(Debug)]
pub struct DmaBuf {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// `DRM_FORMAT_*` of drm_fourcc.h.
    pub fourcc: u32,
    /// `DRM_FORMAT_MOD_*` of drm_fourcc.h.
    pub modifier: u64,
    /// At least one.
    pub planes: Vec<Plane>,
    /// The picture's last row lies first in memory.
    pub flipped: bool,
    /// Of the first plane, once it was read.
    mapping: OnceLock<Mapping>,
}

impl DmaBuf {
    /// A picture as QEMU says it. `y0_top` says which row the texture's first one is as OpenGL
    /// counts them, from below: with it, that is the picture's last one. So read it QEMU's own windows
    /// (`egl_fb_blit` in its ui/gtk-egl.c); virglrenderer lays out such textures like that.
    pub(crate) fn checked(
        (width, height): (u32, u32),
        fourcc: u32,
        modifier: u64,
        planes: Vec<Plane>,
        y0_top: bool,
    ) -> Result<Self, Error> {
        check_size(width, height)?;
        if fourcc == 0 {
            return Err(Error::Nonsense("a DMA-BUF of no format".to_owned()));
        }
        let buffer = Self {
            width,
            height,
            fourcc,
            modifier,
            planes,
            flipped: y0_top,
            mapping: OnceLock::new(),
        };
        let format = PixelFormat::from_fourcc(fourcc).filter(|_| modifier == LINEAR);
        let Some((format, plane)) = format.zip(buffer.planes.first()) else {
            // Its driver checks.
            return Ok(buffer);
        };
        let layout = Layout::of_rows(width, height, plane.stride, format)?;
        let needed = u64::from(plane.offset) + layout.used_bytes() as u64;
        if needed > plane.size {
            return Err(Error::Nonsense(format!(
                "a DMA-BUF of {} bytes for a picture that needs {needed}",
                plane.size
            )));
        }
        Ok(buffer)
    }

    /// How the pixels lie, if they do so one after the other: where other memory is used how, only
    /// its driver knows.
    pub fn layout(&self) -> Option<Layout> {
        let format = PixelFormat::from_fourcc(self.fourcc).filter(|_| self.modifier == LINEAR)?;
        let stride = self.planes.first()?.stride;
        Layout::of_rows(self.width, self.height, stride, format).ok()
    }

    /// Lets the picture be read, as soon as whoever draws it is done. An error says that it cannot
    /// be: it has no [`DmaBuf::layout`], or is in memory that no processor reaches.
    pub(crate) fn read(&self) -> Result<Reading<'_>, Error> {
        let known = self.layout().zip(self.planes.first());
        let (layout, plane) = known.ok_or_else(|| {
            let name = String::from_utf8_lossy(&self.fourcc.to_le_bytes()).into_owned();
            Error::System(format!(
                "only a GPU can read a DMA-BUF of {name} with modifier {:#x} (start QEMU without \
                 gl=on in -display)",
                self.modifier
            ))
        })?;
        let mapping = if let Some(mapping) = self.mapping.get() {
            mapping
        } else {
            let new = Mapping::new(plane)?;
            self.mapping.get_or_init(|| new)
        };
        sync(plane, SYNC_START_READ)?;
        Ok(Reading {
            plane,
            mapping,
            layout,
            flipped: self.flipped,
        })
    }
}

/// A plane of a [`DmaBuf`].
#[derive(Debug)]
pub struct Plane {
    /// The buffer.
    pub fd: OwnedFd,
    /// Bytes of the whole buffer.
    pub size: u64,
    /// Where the plane begins in it, in bytes.
    pub offset: u32,
    /// Bytes from one row to the next.
    pub stride: u32,
}

impl Plane {
    /// A plane as QEMU says it, if `fd` is a DMA-BUF.
    pub(crate) fn checked(fd: OwnedFd, offset: u32, stride: u32) -> Result<Self, Error> {
        let kind = fstatfs(&fd).map(|info| info.filesystem_type());
        if kind != Ok(DMA_BUF_MAGIC) {
            return Err(Error::Nonsense(
                "a file as a DMA-BUF that is none".to_owned(),
            ));
        }
        let mut file = File::from(fd);
        let size = file
            .seek(SeekFrom::End(0))
            .map_err(|error| Error::Nonsense(format!("a DMA-BUF without a size: {error}")))?;
        if u64::from(offset) >= size {
            return Err(Error::Nonsense(format!(
                "a DMA-BUF of {size} bytes with a plane at {offset}"
            )));
        }
        Ok(Self {
            fd: file.into(),
            size,
            offset,
            stride,
        })
    }

    /// Who has made the buffer, if the kernel says it (Documentation/filesystems/proc.rst, fdinfo).
    fn exporter(&self) -> Option<String> {
        let path = format!("/proc/self/fdinfo/{}", self.fd.as_raw_fd());
        let said = std::fs::read_to_string(path).ok()?;
        let name = said
            .lines()
            .find_map(|line| line.strip_prefix("exp_name:"))?;
        Some(name.trim().to_owned())
    }
}

/// A picture while it is read: whoever draws it knows.
#[derive(Debug)]
pub(crate) struct Reading<'a> {
    plane: &'a Plane,
    mapping: &'a Mapping,
    layout: Layout,
    flipped: bool,
}

impl Reading<'_> {
    /// See [`crate::Pixels::copy_to`].
    pub fn copy_to(&self, out: &mut [u8], stride: usize) -> Result<(), Error> {
        let out = self.layout.room(out, stride)?;
        let (row, last) = (self.layout.row_bytes(), self.layout.height as usize - 1);
        for (index, to) in out.chunks_mut(stride).enumerate() {
            let lies = if self.flipped { last - index } else { index };
            let at = self.plane.offset as usize + lies * self.layout.stride as usize;
            self.mapping.copy(at, &mut to[..row]);
        }
        Ok(())
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        // There is nothing to be done about it: what was read was read.
        let _ = sync(self.plane, SYNC_END_READ);
    }
}

/// Tells whoever draws that reading begins or ends; at the beginning, waits for it.
fn sync(plane: &Plane, flags: u64) -> Result<(), Error> {
    loop {
        // SAFETY: the ioctl reads one u64 (struct dma_buf_sync), which lives through the call.
        match unsafe { dma_buf_sync(plane.fd.as_raw_fd(), &raw const flags) } {
            Ok(_) => return Ok(()),
            // To be called again (linux/dma-buf.h).
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            Err(error) => return Err(unreadable(error)),
        }
    }
}

fn unreadable(error: Errno) -> Error {
    Error::System(format!(
        "a DMA-BUF cannot be read here: {error} (start QEMU without gl=on in -display)"
    ))
}

/// All of a DMA-BUF, to be read.
#[derive(Debug)]
struct Mapping {
    start: NonNull<c_void>,
    size: usize,
}

// SAFETY: a mapping belongs to the whole process, and is only read through `copy`.
unsafe impl Send for Mapping {}
// SAFETY: as above; two threads may read at once.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(plane: &Plane) -> Result<Self, Error> {
        let size = usize::try_from(plane.size).ok().and_then(NonZeroUsize::new);
        let size = size.ok_or_else(|| unreadable(Errno::EINVAL))?;
        let (access, kind) = (ProtFlags::PROT_READ, MapFlags::MAP_SHARED);
        // SAFETY: a new mapping at an address that the kernel chooses, removed in `drop`. A DMA-BUF
        // never changes its size, so that all of it can be read for as long as it is there.
        let start = unsafe { mmap(None, size, access, kind, &plane.fd, 0) }.map_err(unreadable)?;
        Ok(Self {
            start,
            size: size.get(),
        })
    }

    /// Copies what lies at `at`; the caller has checked that it is there.
    fn copy(&self, at: usize, out: &mut [u8]) {
        assert!(at + out.len() <= self.size, "the layout was checked");
        // SAFETY: so many bytes are mapped from there on, see above, and `out` is other memory.
        // Others may draw into it meanwhile: what is torn then is the picture and nothing else, as
        // any bytes are pixels.
        unsafe {
            let from = self.start.as_ptr().cast::<u8>().add(at);
            from.copy_to_nonoverlapping(out.as_mut_ptr(), out.len());
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping of `new`; nobody has a pointer into it.
        let _ = unsafe { munmap(self.start, self.size) };
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    const XR24: u32 = u32::from_le_bytes(*b"XR24");

    /// No DMA-BUF, but as large as one.
    fn plane(size: u64, offset: u32, stride: u32) -> Plane {
        let fd = memfd_create("test", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&fd, size as i64).unwrap();
        Plane {
            fd,
            size,
            offset,
            stride,
        }
    }

    #[test]
    fn a_memfd_is_no_dma_buf() {
        let fd = memfd_create("test", MFdFlags::empty()).unwrap();
        nix::unistd::ftruncate(&fd, 4096).unwrap();
        assert!(Plane::checked(fd, 0, 64).is_err());
    }

    #[test]
    fn an_unknown_modifier_of_unknown_memory_stays_unknown() {
        // The kernel does not say that a memfd is anybody's; ci/vm has real ones.
        let planes = [plane(64, 0, 16)];
        assert_eq!(known_modifier(INVALID, &planes), INVALID);
        assert_eq!(known_modifier(1 << 56, &planes), 1 << 56);
        assert_eq!(known_modifier(LINEAR, &planes), LINEAR);
    }

    #[test]
    fn a_linear_picture_must_fit() {
        let checked = |size, plane| DmaBuf::checked(size, XR24, LINEAR, vec![plane], false);
        assert!(checked((4, 4), plane(64, 0, 16)).is_ok());
        // The last row may end with its pixels.
        assert!(checked((4, 4), plane(112, 0, 32)).is_ok());
        assert!(checked((4, 4), plane(63, 0, 16)).is_err());
        assert!(checked((4, 4), plane(64, 4, 16)).is_err());
        assert!(checked((4, 4), plane(64, 0, 15)).is_err());
        assert!(checked((4, 0), plane(64, 0, 16)).is_err());
        assert!(checked((8192, 8192), plane(64, u32::MAX, u32::MAX)).is_err());
    }

    #[test]
    fn a_picture_must_have_a_format() {
        for modifier in [LINEAR, 1 << 56] {
            assert!(DmaBuf::checked((4, 4), 0, modifier, vec![], false).is_err());
        }
    }

    #[test]
    fn only_a_gpu_reads_what_is_not_linear() {
        let tiled = DmaBuf::checked((4, 4), XR24, 1 << 56, vec![plane(64, 0, 16)], false);
        assert!(tiled.unwrap().read().is_err());
        let unknown = u32::from_le_bytes(*b"NV12");
        let unknown = DmaBuf::checked((4, 4), unknown, LINEAR, vec![plane(64, 0, 4)], false);
        assert!(unknown.unwrap().read().is_err());
    }

    #[test]
    fn the_top_row_is_the_first_wherever_it_lies() {
        for (flipped, expected) in [(false, [0, 1, 2]), (true, [2, 1, 0])] {
            let plane = plane(8 + 3 * 16, 8, 16);
            let mut bytes = vec![9; 8];
            (0..3).for_each(|row| bytes.extend([row; 16]));
            nix::unistd::write(&plane.fd, &bytes).unwrap();
            let mapping = Mapping::new(&plane).unwrap();
            let format = PixelFormat::Bgrx;
            let reading = Reading {
                plane: &plane,
                mapping: &mapping,
                layout: Layout::of_rows(4, 3, 16, format).unwrap(),
                flipped,
            };
            let mut out = [7; 2 * 20 + 16];
            reading.copy_to(&mut out, 20).unwrap();
            for (row, value) in out.chunks(20).zip(expected) {
                assert_eq!(row[..16], [value; 16]);
                assert!(
                    row[16..].iter().all(|byte| *byte == 7),
                    "padding is not touched"
                );
            }
            assert!(reading.copy_to(&mut out[1..], 20).is_err());
            assert!(reading.copy_to(&mut out, 15).is_err());
        }
    }
}
