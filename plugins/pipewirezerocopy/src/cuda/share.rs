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
    /// One of which nothing can be used any more.
    dead: gst::glib::WeakRef<gst::Object>,
}

impl Slot {
    /// The context, if there is one.
    pub fn get(&self) -> Option<Context> {
        self.with(|state| state.context.clone())
    }

    /// Forgets the context, and takes only one of this device from now on.
    pub fn reset(&self, device: Option<u32>) {
        let before = self.with(|state| {
            state.device = device;
            state.context.take()
        });
        // Here, where nothing is locked: it may be the last reference.
        drop(before);
    }

    /// Forgets the context, and does not take it again: its GPU is lost. Elements keep what they were
    /// given, also when they are stopped.
    pub fn bury(&self) {
        let before = self.with(|state| {
            state.dead = state
                .context
                .as_ref()
                .map_or_else(Default::default, Context::downgrade);
            state.context.take()
        });
        drop(before);
    }

    /// Takes only a context of this device from now on, and forgets one of another.
    fn restrict(&self, device: u32) {
        if self.get().is_none_or(|context| context.device() == device) {
            self.with(|state| state.device = Some(device));
        } else {
            self.reset(Some(device));
        }
    }

    /// Keeps a context if there is none yet and it is of the right device.
    fn offer(&self, context: Context) {
        let device = context.device();
        if self
            .with(|state| state.dead.upgrade())
            .is_some_and(|dead| context.is(&dead))
        {
            return;
        }
        let refused = self.with(|state| {
            let right = state.device.is_none_or(|wanted| wanted == device);
            if state.context.is_none() && right {
                state.context = Some(context);
                return None;
            }
            Some(context)
        });
        // Here, where nothing is locked: it may be the last reference.
        drop(refused);
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

/// The context, of whatever device, that the element was given: in an earlier run, too.
pub fn given_to(element: &gst::Element) -> Option<Context> {
    Context::from_shared(element.context(CONTEXT_TYPE)?.as_ref())
}

/// The contexts, of whatever device, that elements downstream of `pad` share, and that the element was
/// [given](given_to). Calls downstream: hold no lock.
pub fn shared_with(element: &gst::Element, pad: &gst::Pad) -> impl Iterator<Item = Context> {
    let downstream = || {
        let mut query = gst::query::Context::new(CONTEXT_TYPE);
        pad.peer_query(&mut query)
            .then(|| Context::from_shared(query.context()?))?
    };
    downstream()
        .into_iter()
        .chain(std::iter::once_with(|| given_to(element)).flatten())
}

/// The element's context on this device: the one it has, else one of [`shared_with`], else the
/// application's, else a new one, which the others are told of. One of another device is not taken.
///
/// Calls downstream and posts messages: hold no lock.
pub fn ensure(
    element: &gst::Element,
    pad: &gst::Pad,
    slot: &Slot,
    device: u32,
) -> Result<Context, Error> {
    available()?;
    slot.restrict(device);
    if let Some(context) = slot.get() {
        return Ok(context);
    }
    if let Some(context) = shared_with(element, pad).find(|context| context.device() == device) {
        element.set_context(&context.to_shared()?);
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
