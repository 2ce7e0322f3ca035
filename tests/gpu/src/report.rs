// SPDX-License-Identifier: MIT OR Apache-2.0

//! What this machine has, for whoever reads why something did not run.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;

use crate::egl::{self, find};
use crate::gpu::Gpu;

/// `EGL_EXTENSIONS`, `EGL_VENDOR` and `EGL_VERSION` (egl.h)
const EXTENSIONS: c_int = 0x3055;
const VENDOR: c_int = 0x3053;
const VERSION: c_int = 0x3054;
/// `EGL_PLATFORM_DEVICE_EXT`, `EGL_DRM_DEVICE_FILE_EXT`, `EGL_DRM_RENDER_NODE_FILE_EXT` and
/// `EGL_CUDA_DEVICE_NV` (eglext.h)
const PLATFORM_DEVICE: u32 = 0x313F;
const DRM_DEVICE_FILE: c_int = 0x3233;
const DRM_RENDER_NODE_FILE: c_int = 0x3377;
const CUDA_DEVICE: c_int = 0x323A;

/// What is needed of a display, or helps.
const WANTED: [&str; 9] = [
    "EGL_KHR_surfaceless_context",
    "EGL_KHR_no_config_context",
    "EGL_KHR_gl_texture_2D_image",
    "EGL_EXT_image_dma_buf_import",
    "EGL_EXT_image_dma_buf_import_modifiers",
    "EGL_MESA_image_dma_buf_export",
    "EGL_KHR_fence_sync",
    "EGL_KHR_wait_sync",
    "EGL_ANDROID_native_fence_sync",
];

/// Prints it. Nothing of it is an error.
pub fn print(gpu: &Gpu) {
    println!("{}; {}", gst::version_string(), gpu.about);
    let driver = std::fs::read_to_string("/proc/driver/nvidia/version");
    let first = driver.as_deref().ok().and_then(|text| text.lines().next());
    println!(
        "driver: {}",
        first.unwrap_or("no /proc/driver/nvidia/version")
    );
    println!("nodes: {}", nodes().join(" "));
    let registry = gst::Registry::get();
    for name in ["coreelements", "app", "nvcodec"] {
        let plugin = registry.find_plugin(name);
        let path = plugin.as_ref().and_then(gst::Plugin::filename);
        println!(
            "GStreamer's plugin {name}: {}",
            match (&plugin, path) {
                (Some(_), Some(path)) => path.display().to_string(),
                (Some(_), None) => "built in".into(),
                (None, _) => "not there, or it cannot be loaded".into(),
            }
        );
    }
    if let Err(error) = devices() {
        println!("EGL: {error}");
    }
}

/// The nodes of NVIDIA's driver and of DRM.
fn nodes() -> Vec<String> {
    let listed = |folder: &str| {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let paths = entries.map(|entry| entry.path().display().to_string());
        paths.collect::<Vec<_>>()
    };
    let mut all = listed("/dev");
    all.retain(|path| path.starts_with("/dev/nvidia"));
    all.extend(listed("/dev/dri"));
    all.sort();
    if all.is_empty() {
        all.push("neither /dev/nvidia* nor /dev/dri".into());
    }
    all
}

type Device = *mut c_void;
type Display = *mut c_void;

/// The devices that EGL knows, and what the display of each can do.
fn devices() -> Result<(), String> {
    let lookup = egl::lookup()?;
    // SAFETY: the types are those of egl.h and eglext.h; all that is written is ours and large enough, strings
    // are static, and devices are those that were enumerated.
    unsafe {
        let query_devices: unsafe extern "C" fn(c_int, *mut Device, *mut c_int) -> u32 =
            find(lookup, c"eglQueryDevicesEXT")?;
        let query_string: unsafe extern "C" fn(Device, c_int) -> *const c_char =
            find(lookup, c"eglQueryDeviceStringEXT")?;
        let query_attribute: unsafe extern "C" fn(Device, c_int, *mut isize) -> u32 =
            find(lookup, c"eglQueryDeviceAttribEXT")?;
        let open: unsafe extern "C" fn(u32, Device, *const isize) -> Display =
            find(lookup, c"eglGetPlatformDisplay")?;
        let initialize: unsafe extern "C" fn(Display, *mut c_int, *mut c_int) -> u32 =
            find(lookup, c"eglInitialize")?;
        let string: unsafe extern "C" fn(Display, c_int) -> *const c_char =
            find(lookup, c"eglQueryString")?;
        let text = |said: *const c_char| {
            (!said.is_null()).then(|| CStr::from_ptr(said).to_string_lossy().into_owned())
        };
        let (mut devices, mut count) = ([ptr::null_mut(); 64], 0);
        if query_devices(devices.len() as c_int, devices.as_mut_ptr(), &raw mut count) != 1 {
            return Err("eglQueryDevicesEXT failed".into());
        }
        let count = usize::try_from(count).unwrap_or(0).min(devices.len());
        println!("EGL devices: {count}");
        for (number, &device) in devices[..count].iter().enumerate() {
            let extensions = text(query_string(device, EXTENSIONS)).unwrap_or_default();
            let has = |name: &str| extensions.split(' ').any(|one| one == name);
            let mut said = vec![format!("EGL device {number}: {extensions}")];
            if has("EGL_EXT_device_drm") {
                said.extend(text(query_string(device, DRM_DEVICE_FILE)));
            }
            if has("EGL_EXT_device_drm_render_node") {
                said.extend(text(query_string(device, DRM_RENDER_NODE_FILE)));
            }
            let mut cuda = 0;
            if has("EGL_NV_device_cuda") && query_attribute(device, CUDA_DEVICE, &raw mut cuda) == 1
            {
                said.push(format!("CUDA device {cuda}"));
            }
            println!("{}", said.join("; "));
            let display = open(PLATFORM_DEVICE, device, ptr::null());
            let (mut major, mut minor) = (0, 0);
            if display.is_null() || initialize(display, &raw mut major, &raw mut minor) != 1 {
                println!("EGL device {number}: its display cannot be initialised");
                continue;
            }
            let known = text(string(display, EXTENSIONS)).unwrap_or_default();
            let lacks = |name: &&&str| !known.split(' ').any(|one| one == **name);
            let missing: Vec<_> = WANTED.iter().filter(lacks).copied().collect();
            println!(
                "EGL device {number}: {} {}; lacks {}",
                text(string(display, VENDOR)).unwrap_or_default(),
                text(string(display, VERSION)).unwrap_or_default(),
                if missing.is_empty() {
                    "nothing".into()
                } else {
                    missing.join(" ")
                }
            );
        }
    }
    Ok(())
}
