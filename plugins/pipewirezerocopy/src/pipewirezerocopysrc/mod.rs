// SPDX-License-Identifier: MIT OR Apache-2.0

use gst::glib;
use gst::prelude::*;

mod abilities;
mod caps;
mod cuda;
mod dmabuf;
mod figures;
mod frames;
mod gpu;
mod gpu_queue;
mod imp;
mod latch;
mod negotiation;
mod offers;
mod output;
mod pointer;
mod schedule;
mod settings;
mod streaming;

glib::wrapper! {
    /// The element `pipewirezerocopysrc`: frames of a PipeWire node as a live video stream.
    pub struct PipeWireZeroCopySrc(ObjectSubclass<imp::PipeWireZeroCopySrc>)
        @extends gst_base::PushSrc, gst_base::BaseSrc, gst::Element, gst::Object;
}

/// In which memory frames leave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstPipeWireZeroCopySrcOutputMode")]
#[repr(i32)]
pub enum OutputMode {
    /// The best that downstream takes and this machine can do.
    #[default]
    #[enum_value(
        name = "The best that downstream takes and this machine can do",
        nick = "auto"
    )]
    Auto,
    /// CUDA memory.
    #[enum_value(name = "CUDA memory", nick = "cuda")]
    Cuda,
    /// The producer's DMA-BUFs.
    #[enum_value(name = "The producer's DMA-BUFs, passed on", nick = "dmabuf")]
    DmaBuf,
    /// System memory.
    #[enum_value(name = "System memory", nick = "system")]
    System,
}

/// How CUDA gets at a picture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstPipeWireZeroCopySrcCudaImport")]
#[repr(i32)]
pub enum CudaImport {
    /// The one that is thought to be better.
    #[default]
    #[enum_value(name = "The one that is thought to be better", nick = "auto")]
    Auto,
    /// The EGL image is registered with CUDA, or drawn where the driver refuses that.
    #[enum_value(
        name = "Registered with CUDA; drawn where the driver refuses that",
        nick = "egl-image"
    )]
    EglImage,
    /// The EGL image is drawn into a texture that is registered with CUDA.
    #[enum_value(
        name = "Drawn into a texture that is registered with CUDA",
        nick = "gl-texture"
    )]
    GlTexture,
}

/// What a vanished producer means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstPipeWireZeroCopySrcOnDisconnect")]
#[repr(i32)]
pub enum OnDisconnect {
    /// An error.
    #[default]
    #[enum_value(name = "An error", nick = "error")]
    Error,
    /// The end of the stream.
    #[enum_value(name = "The end of the stream", nick = "eos")]
    Eos,
    /// A pause, until the node is back.
    #[enum_value(
        name = "A pause without keepalives, until the node is back",
        nick = "none"
    )]
    None,
}

pub(crate) fn register(plugin: &gst::Plugin) -> Result<(), glib::BoolError> {
    gst::Element::register(
        Some(plugin),
        "pipewirezerocopysrc",
        gst::Rank::NONE,
        PipeWireZeroCopySrc::static_type(),
    )
}
