// SPDX-License-Identifier: MIT OR Apache-2.0

//! One CUDA context for a pipeline: elements ask their neighbours and the application for one before
//! they make their own, and tell the others of it.
//!
//! This does what `gst_cuda_ensure_element_context` does, with one difference: that function writes
//! to the element's context while it calls `set_context` of the same element (L17), which can be
//! had neither with a lock nor without one. Here nothing is locked while somebody else is called.

use std::sync::{Mutex, PoisonError};

use gst::prelude::*;

use super::{Context, Error, available};

/// `GST_CUDA_CONTEXT_TYPE` (gstcudacontext.h)
pub const CONTEXT_TYPE: &str = "gst.cuda.context";

/// The context of an element, and the device that it was told to use.
#[derive(Debug, Default)]
pub struct Slot(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    context: Option<Context>,
    /// None = any.
    device: Option<u32>,
}

impl Slot {
    /// The context, if there is one.
    pub fn get(&self) -> Option<Context> {
        self.with(|state| state.context.clone())
    }

    /// Forgets the context, and takes only one of this device from now on.
    pub fn reset(&self, device: Option<u32>) {
        let before = self.with(|state| {
            std::mem::replace(
                state,
                State {
                    context: None,
                    device,
                },
            )
        });
        // Here, where nothing is locked: it may be the last reference.
        drop(before);
    }

    /// Keeps a context if there is none yet and it is of the right device.
    fn offer(&self, context: Context) {
        let device = context.device();
        self.with(|state| {
            if state.context.is_none() && state.device.is_none_or(|wanted| wanted == device) {
                state.context = Some(context);
            }
        });
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What an element does in `set_context`.
pub fn set_context(slot: &Slot, shared: &gst::ContextRef) {
    if let Some(context) = Context::from_shared(shared) {
        slot.offer(context);
    }
}

/// What an element does with a context query: answers with its own, if it has one. False where the
/// query is somebody else's matter.
pub fn answer(slot: &Slot, query: &mut gst::query::Context<gst::QueryRef>) -> bool {
    if query.context_type() != CONTEXT_TYPE {
        return false;
    }
    let Some(Ok(shared)) = slot.get().map(|context| context.to_shared()) else {
        return false;
    };
    query.set_context(&shared);
    true
}

/// The element's context: the one it has, else downstream's, else the application's, else a new one
/// on the device it was told, or on that of `own`, which the others are told of.
///
/// Calls downstream and posts messages: hold no lock.
pub fn ensure(
    element: &gst::Element,
    pad: &gst::Pad,
    slot: &Slot,
    own: impl FnOnce() -> u32,
) -> Result<Context, Error> {
    available()?;
    if let Some(context) = slot.get() {
        return Ok(context);
    }
    // What it was given, or had made, before.
    if let Some(shared) = element.context(CONTEXT_TYPE) {
        set_context(slot, &shared);
    }
    if slot.get().is_none() {
        let mut query = gst::query::Context::new(CONTEXT_TYPE);
        if pad.peer_query(&mut query)
            && let Some(shared) = query.context_owned()
        {
            element.set_context(&shared);
        }
    }
    if slot.get().is_none() {
        let message = gst::message::NeedContext::builder(CONTEXT_TYPE)
            .src(element)
            .build();
        // Who has one calls `set_context` before this returns.
        let _ = element.post_message(message);
    }
    if let Some(context) = slot.get() {
        return Ok(context);
    }
    let device = slot.with(|state| state.device).unwrap_or_else(own);
    slot.offer(Context::new(device)?);
    // Another thread may have been faster; there is one now in any case.
    let context = slot.get().ok_or_else(|| {
        Error::Unavailable(format!(
            "a context on CUDA device {device} says it is on another one"
        ))
    })?;
    let shared = context.to_shared()?;
    element.set_context(&shared);
    let message = gst::message::HaveContext::builder(shared)
        .src(element)
        .build();
    let _ = element.post_message(message);
    Ok(context)
}
