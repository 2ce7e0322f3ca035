// SPDX-License-Identifier: MIT OR Apache-2.0

//! The EGL display of a DRM node, and what it can import.

use std::collections::HashMap;
use std::ffi::{c_char, c_void};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use khronos_egl as egl;

use super::image::Image;
use super::library::{self, Egl, Gbm};
use super::{DmaBuf, Error, describe};

// From eglext.h.
const PLATFORM_DEVICE_EXT: egl::Enum = 0x313F;
const PLATFORM_GBM_KHR: egl::Enum = 0x31D7;
const DRM_DEVICE_FILE_EXT: egl::Int = 0x3233;
const DRM_RENDER_NODE_FILE_EXT: egl::Int = 0x3377;
const DEVICE_EXT: egl::Int = 0x322C;
const CUDA_DEVICE_NV: egl::Int = 0x323A;
type DeviceExt = *mut c_void;
type QueryDevices =
    unsafe extern "system" fn(egl::Int, *mut DeviceExt, *mut egl::Int) -> egl::Boolean;
type QueryDeviceString = unsafe extern "system" fn(DeviceExt, egl::Int) -> *const c_char;
type QueryDisplayAttrib =
    unsafe extern "system" fn(egl::EGLDisplay, egl::Int, *mut egl::Attrib) -> egl::Boolean;
type QueryDeviceAttrib =
    unsafe extern "system" fn(DeviceExt, egl::Int, *mut egl::Attrib) -> egl::Boolean;
type QueryFormats = unsafe extern "system" fn(
    egl::EGLDisplay,
    egl::Int,
    *mut egl::Int,
    *mut egl::Int,
) -> egl::Boolean;
type QueryModifiers = unsafe extern "system" fn(
    egl::EGLDisplay,
    egl::Int,
    egl::Int,
    *mut u64,
    *mut egl::Boolean,
    *mut egl::Int,
) -> egl::Boolean;

/// The major number of DRM's nodes (devices.txt of Linux).
const DRM_MAJOR: libc::c_uint = 226;
/// More than any driver says; one that says more is not believed.
const MOST: usize = 4096;

/// A format that can be imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Format {
    /// DRM fourcc.
    pub fourcc: u32,
    /// DRM format modifiers of what can be sampled as an ordinary texture, in the driver's order.
    pub modifiers: Vec<u64>,
    /// Those that only an external texture can be made of: neither CUDA nor a plain shader reads
    /// them, but they can be shown and handed on.
    pub external: Vec<u64>,
}

/// The EGL display of a DRM node. Cheap to clone; all clones are the same display.
#[derive(Clone)]
pub struct Display {
    inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub egl: &'static Egl,
    pub raw: egl::Display,
    node: PathBuf,
    extensions: String,
    /// Modifiers can be said on import.
    pub with_modifiers: bool,
    /// What the display was made from; it uses them as long as it lives.
    _native: Option<(Gbm, File)>,
}

// SAFETY: EGL displays may be used from any thread, and so may what is done with one here: EGL
// locks it itself. The GBM device is only kept.
unsafe impl Send for Inner {}
// SAFETY: see above; nothing in it changes after it was made.
unsafe impl Sync for Inner {}

/// What a display was opened for.
#[derive(PartialEq, Eq, Hash)]
enum Key {
    /// The number of a node's device.
    Node(u64),
    /// The number of a CUDA device.
    Cuda(u32),
}

/// All displays of this process. A display is never closed:
/// `eglTerminate` would end it for whoever else in this process has the same one.
static DISPLAYS: LazyLock<Mutex<HashMap<Key, Display>>> = LazyLock::new(Mutex::default);

impl Display {
    /// Opens the display of a DRM node, for example `/dev/dri/renderD128`. The driver's own EGL
    /// device is preferred; where none goes with the node, Mesa's GBM is asked (software
    /// rendering on a primary node).
    pub fn open(node: &Path) -> Result<Self, Error> {
        let unavailable = |text: String| Error::Unavailable(format!("{}: {text}", node.display()));
        let device = node
            .metadata()
            .map_err(|error| unavailable(error.to_string()))?
            .rdev();
        // Mesa takes anything else for a display without hardware.
        if libc::major(device) != DRM_MAJOR {
            return Err(unavailable("is no DRM node".into()));
        }
        let mut displays = DISPLAYS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(display) = displays.get(&Key::Node(device)) {
            return Ok(display.clone());
        }
        let egl = library::egl()?;
        let of_device = Self::of_device(egl, node, |_, extensions, string| {
            Self::has_node(device, extensions, string)
        });
        let importing = |display: Self| display.check_import().map(|()| display);
        let opened = match of_device.and_then(importing) {
            Ok(display) => Ok(display),
            Err(of_device) => Self::of_gbm(egl, node)
                .and_then(importing)
                .map_err(|of_gbm| {
                    unavailable(format!(
                        "no EGL display; as EGL device: {of_device}; through GBM: {of_gbm}"
                    ))
                }),
        }?;
        displays.insert(Key::Node(device), opened.clone());
        Ok(opened)
    }

    /// Opens the display of the GPU that is a CUDA device of this number, also where it has no DRM
    /// node, as in a container that was given no more than CUDA. Its driver may import nothing there, which
    /// [`formats`](Self::formats) and [`import`](Self::import) say.
    pub fn of_cuda_device(number: u32) -> Result<Self, Error> {
        let mut displays = DISPLAYS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(display) = displays.get(&Key::Cuda(number)) {
            return Ok(display.clone());
        }
        let name = PathBuf::from(format!("cuda:{number}"));
        let egl = library::egl()?;
        // SAFETY: the type is that of EGL_EXT_device_query.
        let attribute: QueryDeviceAttrib =
            unsafe { library::extension(egl, "eglQueryDeviceAttribEXT") }?;
        let opened = Self::of_device(egl, &name, |device, extensions, _| {
            let mut found = 0;
            // SAFETY: the device was enumerated just now, and the number that is written is ours.
            has(extensions, "EGL_NV_device_cuda")
                && unsafe { attribute(device, CUDA_DEVICE_NV, &raw mut found) } == egl::TRUE
                && u32::try_from(found) == Ok(number)
        })
        .map_err(|error| Error::Unavailable(format!("{}: {error}", name.display())))?;
        displays.insert(Key::Cuda(number), opened.clone());
        Ok(opened)
    }

    /// Whether an EGL device says that this node is its own.
    fn has_node(
        wanted: u64,
        extensions: &str,
        string: impl Fn(egl::Int) -> Option<&'static str>,
    ) -> bool {
        let files = [
            ("EGL_EXT_device_drm_render_node", DRM_RENDER_NODE_FILE_EXT),
            ("EGL_EXT_device_drm", DRM_DEVICE_FILE_EXT),
        ];
        files
            .into_iter()
            .filter(|(extension, _)| has(extensions, extension))
            .filter_map(|(_, name)| string(name))
            .any(|path| {
                Path::new(path)
                    .metadata()
                    .is_ok_and(|data| data.rdev() == wanted)
            })
    }

    /// The display of the first EGL device that is the right one, by its extensions and strings.
    fn of_device(
        egl: &'static Egl,
        name: &Path,
        is_it: impl Fn(DeviceExt, &str, &dyn Fn(egl::Int) -> Option<&'static str>) -> bool,
    ) -> Result<Self, Error> {
        // SAFETY: the types are those of EGL_EXT_device_enumeration and EGL_EXT_device_query.
        let (query_devices, query_string): (QueryDevices, QueryDeviceString) = unsafe {
            (
                library::extension(egl, "eglQueryDevicesEXT")?,
                library::extension(egl, "eglQueryDeviceStringEXT")?,
            )
        };
        let mut devices = [ptr::null_mut(); 64];
        let mut count = 0;
        // SAFETY: there is room for as many as are asked for.
        let known = unsafe {
            query_devices(
                devices.len() as egl::Int,
                devices.as_mut_ptr(),
                &raw mut count,
            )
        };
        if known != egl::TRUE {
            return Err(failed(egl, "eglQueryDevicesEXT"));
        }
        let count = usize::try_from(count).unwrap_or(0).min(devices.len());
        let device = devices[..count].iter().copied().find(|&device| {
            let string = |name| {
                // SAFETY: the device was enumerated just now, and its strings are static.
                unsafe { library::text(query_string(device, name)) }
                    .and_then(|text| text.to_str().ok())
            };
            // A string that the device does not have is an error to ask for.
            is_it(device, string(egl::EXTENSIONS).unwrap_or_default(), &string)
        });
        let device = device
            .ok_or_else(|| Error::Unavailable(format!("none of {count} EGL devices is its own")))?;
        // SAFETY: the device was enumerated just now, and lives as long as the library.
        let raw =
            unsafe { egl.get_platform_display(PLATFORM_DEVICE_EXT, device, &[egl::ATTRIB_NONE]) }
                .map_err(|error| Error::Unavailable(format!("eglGetPlatformDisplay: {error}")))?;
        Self::new(egl, raw, name, None)
    }

    fn of_gbm(egl: &'static Egl, node: &Path) -> Result<Self, Error> {
        let file = File::options()
            .read(true)
            .write(true)
            .open(node)
            .map_err(|error| Error::Unavailable(error.to_string()))?;
        let gbm = Gbm::open(file.as_fd())?;
        // SAFETY: the device lives as long as the display, which is for ever (see `DISPLAYS`).
        let raw = unsafe {
            egl.get_platform_display(PLATFORM_GBM_KHR, gbm.native(), &[egl::ATTRIB_NONE])
        }
        .map_err(|error| Error::Unavailable(format!("eglGetPlatformDisplay: {error}")))?;
        Self::new(egl, raw, node, Some((gbm, file)))
    }

    fn new(
        egl: &'static Egl,
        raw: egl::Display,
        node: &Path,
        native: Option<(Gbm, File)>,
    ) -> Result<Self, Error> {
        egl.initialize(raw)
            .map_err(|error| Error::Unavailable(format!("eglInitialize: {error}")))?;
        let extensions = egl
            .query_string(Some(raw), egl::EXTENSIONS)
            .map_err(|error| Error::Unavailable(format!("eglQueryString: {error}")))?
            .to_string_lossy()
            .into_owned();
        Ok(Self {
            inner: Arc::new(Inner {
                egl,
                raw,
                node: node.to_owned(),
                with_modifiers: has(&extensions, "EGL_EXT_image_dma_buf_import_modifiers"),
                extensions,
                _native: native,
            }),
        })
    }

    /// An error where it imports no DMA-BUFs.
    fn check_import(&self) -> Result<(), Error> {
        if self.has_extension("EGL_EXT_image_dma_buf_import") {
            return Ok(());
        }
        Err(Error::Unavailable(
            "its driver has no EGL_EXT_image_dma_buf_import".into(),
        ))
    }

    /// The node it was opened for; `cuda:N` for the display of a CUDA device.
    pub fn node(&self) -> &Path {
        &self.inner.node
    }

    /// Whether the display has an EGL extension.
    pub fn has_extension(&self, name: &str) -> bool {
        has(&self.inner.extensions, name)
    }

    /// The number of the CUDA device that the display draws with (EGL_NV_device_cuda), where its
    /// driver is NVIDIA's.
    pub fn cuda_device(&self) -> Option<u32> {
        let Inner { egl, raw, .. } = *self.inner;
        // SAFETY: the types are those of EGL_EXT_device_query.
        let (of_display, of_device, string): (
            QueryDisplayAttrib,
            QueryDeviceAttrib,
            QueryDeviceString,
        ) = unsafe {
            (
                library::extension(egl, "eglQueryDisplayAttribEXT").ok()?,
                library::extension(egl, "eglQueryDeviceAttribEXT").ok()?,
                library::extension(egl, "eglQueryDeviceStringEXT").ok()?,
            )
        };
        let mut device = 0;
        // SAFETY: the display is initialised, and the number that is written is ours.
        let known = unsafe { of_display(raw.as_ptr(), DEVICE_EXT, &raw mut device) };
        let device = (known == egl::TRUE && device != 0).then_some(device as DeviceExt)?;
        // SAFETY: the device is the display's own, and its strings are static.
        let extensions = unsafe { library::text(string(device, egl::EXTENSIONS)) }?;
        if !has(extensions.to_str().ok()?, "EGL_NV_device_cuda") {
            return None;
        }
        let mut number = 0;
        // SAFETY: the device is the display's own, and the number that is written is ours.
        let known = unsafe { of_device(device, CUDA_DEVICE_NV, &raw mut number) };
        (known == egl::TRUE).then(|| u32::try_from(number).ok())?
    }

    /// What can be imported. A format without modifiers is left out; a driver that knows no
    /// modifiers at all says nothing here.
    pub fn formats(&self) -> Result<Vec<Format>, Error> {
        self.check_import()?;
        let Inner { egl, raw, .. } = *self.inner;
        if !self.inner.with_modifiers {
            return Ok(Vec::new());
        }
        // SAFETY: the types are those of EGL_EXT_image_dma_buf_import_modifiers.
        let (query_formats, query_modifiers): (QueryFormats, QueryModifiers) = unsafe {
            (
                library::extension(egl, "eglQueryDmaBufFormatsEXT")?,
                library::extension(egl, "eglQueryDmaBufModifiersEXT")?,
            )
        };
        let fourccs = counted(|mut room: Option<&mut [egl::Int]>, count| {
            let (most, list) = start(&mut room);
            // SAFETY: there is room for as many as are asked for; none is asked for without.
            let known = unsafe { query_formats(raw.as_ptr(), most, list, count) };
            known == egl::TRUE
        })
        .ok_or_else(|| failed(egl, "eglQueryDmaBufFormatsEXT"))?;
        let mut formats = Vec::new();
        for fourcc in fourccs {
            let mut external = Vec::new();
            let modifiers = counted(|mut room: Option<&mut [u64]>, count| {
                let (most, list) = start(&mut room);
                external.resize(most as usize, egl::FALSE);
                // Mesa 25 writes to this list, where there is one, even when it is asked for none.
                let external = match external.as_mut_slice() {
                    [] => ptr::null_mut(),
                    list => list.as_mut_ptr(),
                };
                // SAFETY: there is room in both for as many as are asked for; none is asked for
                // without.
                let known =
                    unsafe { query_modifiers(raw.as_ptr(), fourcc, most, list, external, count) };
                known == egl::TRUE
            })
            .ok_or_else(|| failed(egl, "eglQueryDmaBufModifiersEXT"))?;
            let of_kind = |wanted: bool| {
                let all = modifiers.iter().zip(&external);
                let known = all.filter(|(_, external)| (**external == egl::TRUE) == wanted);
                known.map(|(modifier, _)| *modifier).collect::<Vec<_>>()
            };
            let format = Format {
                fourcc: fourcc.cast_unsigned(),
                modifiers: of_kind(false),
                external: of_kind(true),
            };
            if !modifiers.is_empty() {
                formats.push(format);
            }
        }
        Ok(formats)
    }

    /// Makes an image of a DMA-BUF. The image keeps the memory; the descriptors may be closed.
    ///
    /// The pixels are the producer's as before: the image shows whatever is in the memory when it
    /// is read (lesson L8).
    pub fn import(&self, buffer: &DmaBuf) -> Result<Image, Error> {
        self.check_import()?;
        Image::import(&self.inner, buffer)
    }

    pub(super) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }
}

impl Inner {
    /// Says what was tried with which buffer.
    pub fn about(&self, buffer: &DmaBuf, reason: &str) -> String {
        format!("{} on {}: {reason}", describe(buffer), self.node.display())
    }
}

/// Asks how many there are, then for all of them: some drivers write as many as there are, whatever
/// they are told there is room for.
fn counted<T: Clone + Default>(
    mut query: impl FnMut(Option<&mut [T]>, &mut egl::Int) -> bool,
) -> Option<Vec<T>> {
    let mut count = 0;
    query(None, &mut count).then_some(())?;
    let room = usize::try_from(count).ok().filter(|&room| room <= MOST)?;
    let mut items = vec![T::default(); room];
    if room > 0 {
        query(Some(&mut items), &mut count).then_some(())?;
    }
    items.truncate(usize::try_from(count).ok()?);
    Some(items)
}

/// A list as EGL takes it: for how many there is room, and where.
fn start<T>(room: &mut Option<&mut [T]>) -> (egl::Int, *mut T) {
    match room {
        None => (0, ptr::null_mut()),
        Some(room) => (room.len() as egl::Int, room.as_mut_ptr()),
    }
}

/// Whether a list of extensions has one.
fn has(extensions: &str, name: &str) -> bool {
    extensions.split_ascii_whitespace().any(|one| one == name)
}

/// A call that failed, with EGL's word for it.
fn failed(egl: &Egl, call: &str) -> Error {
    let reason = egl
        .get_error()
        .map_or("no reason given".to_owned(), |error| error.to_string());
    Error::Unavailable(format!("{call}: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_drm_node_says_so() {
        let Err(Error::Unavailable(text)) = Display::open(Path::new("/dev/dri/renderD4711")) else {
            panic!("there is no such node");
        };
        assert!(
            text.starts_with("/dev/dri/renderD4711: No such file"),
            "{text}"
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        for path in [file.path(), Path::new("/dev/null")] {
            let Err(Error::Unavailable(text)) = Display::open(path) else {
                panic!("{} draws nothing", path.display());
            };
            assert!(text.ends_with(": is no DRM node"), "{text}");
        }
    }

    #[test]
    fn extensions_are_whole_words() {
        let list = "EGL_EXT_image_dma_buf_import_modifiers EGL_KHR_fence_sync";
        assert!(!has(list, "EGL_EXT_image_dma_buf_import"));
        assert!(has(list, "EGL_KHR_fence_sync"));
    }

    #[test]
    fn a_count_that_shrinks_or_is_absurd_does_no_harm() {
        let mut asked = Vec::new();
        let items = counted(|room: Option<&mut [u8]>, count| {
            *count = if room.is_none() { 3 } else { 2 };
            asked.push(room.map(|room| {
                room.fill(7);
                room.len()
            }));
            true
        });
        assert_eq!((items, asked), (Some(vec![7, 7]), vec![None, Some(3)]));
        for absurd in [-1, i32::MAX] {
            let items = counted(|room: Option<&mut [u8]>, count| {
                assert!(room.is_none(), "nothing is asked for");
                *count = absurd;
                true
            });
            assert_eq!(items, None);
        }
        assert_eq!(counted(|_: Option<&mut [u8]>, _| true), Some(Vec::new()));
        assert_eq!(counted(|_: Option<&mut [u8]>, _| false), None);
    }
}
