// SPDX-License-Identifier: MIT OR Apache-2.0

//! A resolver for tests: memory that is known, in place of a virtual machine's.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use helix_host::{ClientIdentity, ResolveError, Resource, ResourceResolver};
use helix_protocol::message::PixelFormat;

/// A resource of a machine that does not exist.
#[derive(Clone, Debug)]
pub struct Memory {
    pub width: u32,
    pub height: u32,
    pub format: PixelFormat,
    pub stride: u32,
    pub bytes: Vec<u8>,
}

/// Resources by their ids, for every client alike.
#[derive(Debug, Default)]
pub struct KnownMemory {
    resources: Mutex<BTreeMap<u32, Memory>>,
    asked: Mutex<Vec<(ClientIdentity, Resource)>>,
}

impl KnownMemory {
    /// Makes, changes or, with `None`, frees a resource.
    pub fn set(&self, id: u32, memory: Option<Memory>) {
        let mut resources = self
            .resources
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match memory {
            Some(memory) => resources.insert(id, memory),
            None => resources.remove(&id),
        };
    }

    /// Who has asked for what so far.
    pub fn asked(&self) -> Vec<(ClientIdentity, Resource)> {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.clone()
    }
}

impl ResourceResolver for KnownMemory {
    fn resolve(
        &self,
        client: &ClientIdentity,
        resource: &Resource,
    ) -> Result<gst::Buffer, ResolveError> {
        self.asked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((client.clone(), *resource));
        let resources = self
            .resources
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let memory = resources.get(&resource.id).ok_or(ResolveError::NotFound)?;
        let real = (memory.width, memory.height, memory.format, memory.stride);
        let asked = (
            resource.width,
            resource.height,
            resource.format,
            resource.stride,
        );
        if asked != real {
            return Err(ResolveError::Mismatch(format!(
                "the resource is {real:?}, not {asked:?}"
            )));
        }
        let bytes = memory.bytes.get(..resource.bytes).ok_or_else(|| {
            ResolveError::Unreadable(format!("only {} bytes are mapped", memory.bytes.len()))
        })?;
        // The snapshot: the resource may be freed or drawn into from here on.
        Ok(gst::Buffer::from_slice(bytes.to_vec()))
    }
}
