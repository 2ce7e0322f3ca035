// SPDX-License-Identifier: MIT OR Apache-2.0

//! The GPU by whose abilities DMA-BUFs are offered, and DRM's names for what they hold.

use std::fs;
use std::path::{Path, PathBuf};

use crate::capture::PixelFormat;
use crate::capture::dmabuf::{IMPLICIT, LINEAR};
use crate::cuda::{self, MEMORY_FEATURE, image_formats};
use crate::egl::{Display, Format};

/// Where the kernel's DRM nodes are.
const NODES: &str = "/dev/dri";

/// A GPU, or what stands in for one, that imports DMA-BUFs.
pub(super) struct Gpu {
    /// Its EGL display.
    pub display: Display,
    /// What it imports.
    pub importable: Importable,
}

impl Gpu {
    /// The GPU of the node that was asked for, else of the first node that has one which `suits`. The
    /// error says what is missing.
    pub fn find(
        node: Option<&str>,
        suits: impl Fn(&Self) -> Result<(), String>,
    ) -> Result<Self, String> {
        let open = |node: &Path| {
            let gpu = Self::open(node)?;
            suits(&gpu).map_err(|reason| format!("{}: {reason}", node.display()))?;
            Ok(gpu)
        };
        if let Some(node) = node {
            return open(Path::new(node)).map_err(|error: String| format!("render-node={error}"));
        }
        let mut seen = Vec::new();
        for node in nodes(Path::new(NODES)) {
            match open(&node) {
                Ok(gpu) => return Ok(gpu),
                Err(error) => seen.push(error),
            }
        }
        if seen.is_empty() {
            return Err(format!("there are no DRM nodes in {NODES}"));
        }
        Err(seen.join("; "))
    }

    fn open(node: &Path) -> Result<Self, String> {
        Self::of_display(Display::open(node).map_err(|error| error.to_string())?)
    }

    /// The GPU that is the CUDA device of this number, without a DRM node.
    pub fn of_cuda_device(number: u32) -> Result<Self, String> {
        Self::of_display(Display::of_cuda_device(number).map_err(|error| error.to_string())?)
    }

    /// The number of the CUDA device that it is. The error says what is missing, or that another one
    /// was asked for.
    pub fn cuda_device(&self, asked: Option<Asked>) -> Result<u32, String> {
        cuda::available().map_err(|error| error.to_string())?;
        let device = cuda::of_display(&self.display).map_err(|error| error.to_string())?;
        match asked {
            Some(asked) if asked.device != device => Err(format!(
                "it is CUDA device {device}, not the device {} of {}",
                asked.device,
                if asked.by_name {
                    "cuda-device-id"
                } else {
                    "the CUDA context that is shared"
                }
            )),
            _ => Ok(device),
        }
    }

    fn of_display(display: Display) -> Result<Self, String> {
        let formats = display.formats().map_err(|error| error.to_string())?;
        Ok(Self {
            display,
            importable: Importable(formats),
        })
    }
}

/// What is known of who takes the frames, before a GPU is chosen.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Downstream {
    /// The device of a CUDA context that is shared.
    pub device: Option<u32>,
    /// CUDA memory is all that is taken.
    pub only_cuda: bool,
}

impl Downstream {
    /// Whether who takes these caps takes CUDA memory and nothing else.
    pub fn takes_only_cuda(caps: &gst::CapsRef) -> bool {
        let all = caps.iter_with_features();
        let mut features = all.map(|(_, features)| features);
        !caps.is_any()
            && !caps.is_empty()
            && features.all(|features| !features.is_any() && features.contains(MEMORY_FEATURE))
    }
}

/// The CUDA device that frames are to be on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pub device: u32,
    /// By cuda-device-id, and not by a context that somebody shares.
    pub by_name: bool,
}

impl Asked {
    /// The one that is named, else, where no node is, that of a context that is shared. None where it
    /// is for the node to say.
    pub fn for_node(node: Option<&str>, named: Option<u32>, shared: Option<u32>) -> Option<Self> {
        let by_name = named.is_some();
        let device = named.or(shared.filter(|_| node.is_none()))?;
        Some(Self { device, by_name })
    }
}

/// Render nodes before primary ones, which not everybody may open, each in their order.
fn nodes(folder: &Path) -> Vec<PathBuf> {
    let mut nodes: Vec<_> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let name = path.file_name()?.to_str()?;
            let number = |prefix| name.strip_prefix(prefix)?.parse::<u32>().ok();
            let render = number("renderD").map(|number| (0, number));
            let place = render.or_else(|| number("card").map(|number| (1, number)))?;
            Some((place, path))
        })
        .collect();
    nodes.sort();
    nodes.into_iter().map(|(_, path)| path).collect()
}

/// The formats and modifiers that a GPU imports.
#[derive(Clone, Debug, Default)]
pub(super) struct Importable(pub Vec<Format>);

impl Importable {
    /// The modifiers with which DMA-BUFs of a format are understood by some part of the GPU, the
    /// driver's preferred one first. [`IMPLICIT`] is the last: what a producer and a consumer on
    /// one driver need not say.
    pub fn known(&self, format: PixelFormat) -> Vec<u64> {
        self.listed(format, |known| {
            [&known.modifiers[..], &known.external].concat()
        })
    }

    /// The same for those that a shader can read.
    pub fn readable(&self, format: PixelFormat) -> Vec<u64> {
        self.listed(format, |known| known.modifiers.clone())
    }

    /// The same for those whose planes a shader can read one by one, as images of their own.
    pub fn drawable(&self, format: PixelFormat) -> Vec<u64> {
        let images = image_formats(format.fourcc());
        let mut lists = images
            .into_iter()
            .map(|image| self.listed_as(image, |known| known.modifiers.clone()));
        let mut common = lists.next().unwrap_or_default();
        for list in lists {
            common.retain(|modifier| list.contains(modifier));
        }
        common
    }

    fn listed(&self, format: PixelFormat, of: impl Fn(&Format) -> Vec<u64>) -> Vec<u64> {
        self.listed_as(format.fourcc(), of)
    }

    fn listed_as(&self, fourcc: u32, of: impl Fn(&Format) -> Vec<u64>) -> Vec<u64> {
        if self.0.is_empty() {
            // A driver from before modifiers.
            return vec![LINEAR, IMPLICIT];
        }
        let known = self.0.iter().find(|known| known.fourcc == fourcc);
        let mut listed = known.map(of).unwrap_or_default();
        listed.retain(|modifier| *modifier != IMPLICIT);
        if !listed.is_empty() {
            listed.push(IMPLICIT);
        }
        listed
    }
}

/// A format with its modifier in caps: `XR24:0x0100000000000002`, without the number where rows lie
/// one after another (gst_video_dma_drm_fourcc_to_string). There is no name for [`IMPLICIT`].
pub(super) fn drm_format(format: PixelFormat, modifier: u64) -> Option<String> {
    let name = String::from_utf8(format.fourcc().to_le_bytes().to_vec()).ok()?;
    match modifier {
        IMPLICIT => None,
        LINEAR => Some(name),
        modifier => Some(format!("{name}:{modifier:#018x}")),
    }
}

/// What such a name means; none for formats that are not carried.
pub(super) fn from_drm_format(name: &str) -> Option<(PixelFormat, u64)> {
    let (fourcc, modifier) = match name.split_once(':') {
        Some((fourcc, number)) => {
            let digits = number.strip_prefix("0x").or(number.strip_prefix("0X"))?;
            (fourcc, u64::from_str_radix(digits, 16).ok()?)
        }
        None => (name, LINEAR),
    };
    let fourcc: [u8; 4] = fourcc.as_bytes().try_into().ok()?;
    let format = PixelFormat::from_fourcc(u32::from_le_bytes(fourcc))?;
    Some((format, modifier))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drm_formats_are_written_as_gstreamer_writes_them() {
        for (format, modifier, name) in [
            (PixelFormat::Bgrx, LINEAR, "XR24"),
            (PixelFormat::Nv12, LINEAR, "NV12"),
            (
                PixelFormat::Bgra,
                0x0100_0000_0000_0002,
                "AR24:0x0100000000000002",
            ),
        ] {
            assert_eq!(drm_format(format, modifier).as_deref(), Some(name));
            assert_eq!(from_drm_format(name), Some((format, modifier)));
        }
        assert_eq!(drm_format(PixelFormat::Bgrx, IMPLICIT), None);
        for nonsense in ["P010", "XR24:", "XR24:2", "XR24:0xg", "XR2", ""] {
            assert_eq!(from_drm_format(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn a_format_that_the_driver_does_not_import_has_no_modifiers() {
        let importable = Importable(vec![Format {
            fourcc: PixelFormat::Bgrx.fourcc(),
            modifiers: vec![7, LINEAR],
            external: vec![8],
        }]);
        let bgrx = PixelFormat::Bgrx;
        assert_eq!(importable.known(bgrx), [7, LINEAR, 8, IMPLICIT]);
        assert_eq!(importable.readable(bgrx), [7, LINEAR, IMPLICIT]);
        assert!(importable.known(PixelFormat::Rgba).is_empty());
        let old = Importable::default().known(PixelFormat::Rgba);
        assert_eq!(old, [LINEAR, IMPLICIT]);
    }

    #[test]
    fn planes_are_imported_one_by_one_where_both_can_be() {
        let format = |name: [u8; 4], modifiers: &[u64]| Format {
            fourcc: u32::from_le_bytes(name),
            modifiers: modifiers.to_vec(),
            external: Vec::new(),
        };
        let importable = Importable(vec![
            format(*b"R8  ", &[7, 9, LINEAR]),
            format(*b"GR88", &[LINEAR, 7]),
            format(*b"XR24", &[5]),
        ]);
        let of = |format| importable.drawable(format);
        assert_eq!(of(PixelFormat::Nv12), [7, LINEAR, IMPLICIT]);
        assert_eq!(of(PixelFormat::Bgrx), [5, IMPLICIT]);
        assert!(of(PixelFormat::Rgba).is_empty());
        assert!(of(PixelFormat::Rgb).is_empty(), "no form in CUDA memory");
    }

    #[test]
    fn render_nodes_go_before_primary_ones() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["card1", "renderD129", "card0", "by-path", "renderD128"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let found = nodes(folder.path());
        let names: Vec<_> = found.iter().map(|path| path.file_name().unwrap()).collect();
        assert_eq!(names, ["renderD128", "renderD129", "card0", "card1"]);
        assert!(nodes(Path::new("/nonexistent")).is_empty());
    }

    #[test]
    fn a_device_that_is_named_goes_before_a_shared_one_and_a_node_says_its_own() {
        let of = |node, named, shared| {
            let asked = Asked::for_node(node, named, shared);
            asked.map(|asked| (asked.device, asked.by_name))
        };
        let node = Some("/dev/dri/renderD128");
        assert_eq!(of(None, Some(1), Some(2)), Some((1, true)));
        assert_eq!(of(node, Some(1), Some(2)), Some((1, true)));
        assert_eq!(of(None, None, Some(2)), Some((2, false)));
        assert_eq!(of(node, None, Some(2)), None);
        assert_eq!(of(None, None, None), None);
    }

    #[test]
    fn who_takes_only_cuda_memory_is_told_from_who_takes_other_memory_too() {
        gst::init().unwrap();
        let only = |text: &str| Downstream::takes_only_cuda(&text.parse::<gst::Caps>().unwrap());
        assert!(only("video/x-raw(memory:CUDAMemory)"));
        // As cudaconvertscale says it.
        let overlay = "meta:GstVideoOverlayComposition";
        assert!(only(&format!(
            "video/x-raw(memory:CUDAMemory); video/x-raw(memory:CUDAMemory,{overlay})"
        )));
        assert!(!only("video/x-raw(memory:CUDAMemory); video/x-raw"));
        assert!(!only("video/x-raw(ANY)"));
        assert!(!only("ANY") && !only("EMPTY"));
    }

    #[test]
    fn a_node_that_is_not_there_is_named() {
        let Err(error) = Gpu::find(Some("/dev/dri/renderD4711"), |_| Ok(())) else {
            panic!("there is none");
        };
        assert!(error.starts_with("render-node=/dev/dri/renderD4711: "));
    }
}
