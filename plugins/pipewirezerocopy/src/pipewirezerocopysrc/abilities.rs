// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the element can put out on this machine, as far as the settings want it.

use super::caps::{self, SAYS_MODIFIERS, dma_drm, plain_dmabuf, system, video_format};
use super::gpu::{Importable, drm_format};
use crate::capture::PixelFormat;
use crate::capture::dmabuf::{IMPLICIT, LINEAR};

/// What a DMA-BUF is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// To leave as it is.
    PassOn,
    /// To be copied into system memory.
    Read,
    /// To be copied into CUDA memory.
    Cuda,
}

/// A kind of DMA-BUFs that did not work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub format: PixelFormat,
    pub modifier: u64,
    pub what: Use,
}

/// What can leave, here and now, as far as the settings want it.
#[derive(Clone, Debug, Default)]
pub(super) struct Abilities {
    /// Memory that the CPU has filled.
    pub system: bool,
    /// DMA-BUFs, where there is a GPU.
    pub dmabuf: bool,
    /// CUDA memory, where the GPU has it.
    pub cuda: bool,
    /// What the GPU imports.
    pub gpu: Option<Importable>,
    /// What has turned out not to work.
    pub refused: Vec<Refusal>,
}

impl Abilities {
    /// The modifiers with which DMA-BUFs of that format can be passed on.
    pub fn passable(&self, format: PixelFormat) -> Vec<u64> {
        let gpu = self.gpu.as_ref().filter(|_| self.dmabuf);
        let known = gpu.map_or_else(Vec::new, |gpu| gpu.known(format));
        self.not_refused(known, format, Use::PassOn)
    }

    /// The modifiers with which DMA-BUFs of that format can be read: by the GPU, and where rows lie
    /// one after another by the CPU.
    pub fn readable(&self, format: PixelFormat) -> Vec<u64> {
        if !self.system {
            return Vec::new();
        }
        // What is read back through OpenGL is RGB.
        let gpu = self.gpu.as_ref().filter(|_| format != PixelFormat::Nv12);
        let mut known = gpu.map_or_else(Vec::new, |gpu| gpu.readable(format));
        if !known.contains(&LINEAR) {
            known.insert(0, LINEAR);
        }
        self.not_refused(known, format, Use::Read)
    }

    /// The modifiers with which DMA-BUFs of that format can be copied into CUDA memory.
    pub fn copyable(&self, format: PixelFormat) -> Vec<u64> {
        let known = caps::CUDA_FORMATS.contains(&format);
        let gpu = self.gpu.as_ref().filter(|_| self.cuda && known);
        let known = gpu.map_or_else(Vec::new, |gpu| gpu.drawable(format));
        self.not_refused(known, format, Use::Cuda)
    }

    fn not_refused(&self, mut known: Vec<u64>, format: PixelFormat, what: Use) -> Vec<u64> {
        known.retain(|modifier| {
            !self.refused.contains(&Refusal {
                format,
                modifier: *modifier,
                what,
            })
        });
        known
    }

    /// The caps of what can leave in CUDA memory.
    pub fn cuda_caps(&self) -> gst::Caps {
        let formats = caps::CUDA_FORMATS.into_iter();
        let formats: Vec<_> = formats.filter(|f| !self.copyable(*f).is_empty()).collect();
        if formats.is_empty() {
            return gst::Caps::new_empty();
        }
        caps::cuda(&formats)
    }

    /// The caps of all that can leave.
    pub fn caps(&self) -> gst::Caps {
        let mut caps = self.cuda_caps();
        let writable = caps.make_mut();
        if self.dmabuf && self.gpu.is_some() {
            let formats = PixelFormat::ALL.into_iter().map(|f| (f, self.passable(f)));
            let formats: Vec<_> = formats.collect();
            if SAYS_MODIFIERS {
                let named = formats.iter().flat_map(|(format, modifiers)| {
                    modifiers.iter().filter_map(|m| drm_format(*format, *m))
                });
                let named: Vec<_> = named.collect();
                if !named.is_empty() {
                    writable.append(dma_drm(Some(named)));
                }
            }
            let plain = formats.iter().filter(|(_, modifiers)| {
                modifiers.contains(&LINEAR) || modifiers.contains(&IMPLICIT)
            });
            let plain: Vec<_> = plain.map(|(format, _)| video_format(*format)).collect();
            if !plain.is_empty() {
                writable.append(plain_dmabuf(&plain));
            }
        }
        if self.system {
            writable.append(system());
        }
        caps
    }
}
