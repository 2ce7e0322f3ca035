// SPDX-License-Identifier: MIT OR Apache-2.0

//! How pictures travel on one connection: as resource ids or as pixels, chosen for each.
//!
//! | `transfer` | host | a picture that has a resource id |
//! | --- | --- | --- |
//! | auto | says in HELLO that it resolves ids | goes as one |
//! | auto | legacy, or says that it does not | goes as pixels |
//! | resource-id | legacy, or says that it does | goes as one |
//! | resource-id | says that it does not | is an error |
//! | pixels | any | goes as pixels |
//!
//! A legacy host that is not the one whose device the id is of may answer with another picture,
//! or not at all (quirk 6 of docs/protocol.md), and nobody would notice. So only somebody who
//! knows that host, and says so with `transfer=resource-id`, sends ids to it.
//!
//! With `auto`, a picture that the host refuses is sent again as pixels. A host that has taken
//! no id yet gets no other one on this connection; one that has gets ids of other buffers.

use std::sync::{Arc, Weak};

use helix_protocol::message::{Capabilities, ErrorCode};

use crate::virtgpu::Resource;
use crate::vsockenc::Transfer;

/// How a picture travels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Way {
    /// The pixels themselves.
    #[default]
    Pixels,
    /// The number of a resource that the host has.
    ResourceId,
}

impl Way {
    /// As the property's nicks have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pixels => "pixels",
            Self::ResourceId => "resource-id",
        }
    }
}

/// What is to be done after an ERROR.
#[derive(Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It was not about the way.
    Frame,
    /// Send it again as pixels. `all` = and everything from now on.
    Resource {
        /// No other id will be tried on this connection.
        all: bool,
    },
    /// The only way that is allowed does not work.
    OnlyWay,
}

/// The choice on one connection.
#[derive(Debug)]
pub struct Choice {
    wanted: Transfer,
    ids: Ids,
    /// Those that the host could not use.
    refused: Vec<Weak<Resource>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ids {
    /// May work.
    Possible,
    /// A picture came back.
    Proven,
    /// Not on this connection.
    Out,
}

impl Choice {
    /// `host` is what the host said of itself in HELLO; `None` for a legacy one. Fails, with a
    /// reason for a person, where the only way that is allowed does not work.
    pub fn new(wanted: Transfer, host: Option<Capabilities>) -> Result<Self, String> {
        let resolves = host.map(|host| host.contains(Capabilities::RESOURCE_IDS));
        let ids = match (wanted, resolves) {
            (Transfer::ResourceId, Some(false)) => {
                return Err(
                    "the host does not resolve resource ids; use transfer=auto or pixels"
                        .to_owned(),
                );
            }
            (Transfer::Auto, Some(true)) | (Transfer::ResourceId, _) => Ids::Possible,
            (Transfer::Auto | Transfer::Fd | Transfer::Pixels, _) => Ids::Out,
        };
        let refused = Vec::new();
        Ok(Self {
            wanted,
            ids,
            refused,
        })
    }

    /// How each picture will go, if that is known before the first.
    pub fn only_way(&self) -> Option<Way> {
        match (self.wanted, self.ids) {
            (_, Ids::Out) => Some(Way::Pixels),
            (Transfer::ResourceId, _) => Some(Way::ResourceId),
            _ => None,
        }
    }

    /// The resource as which a picture is to be sent, if not as pixels.
    pub fn choose(&self, resource: Option<&Arc<Resource>>) -> Option<Arc<Resource>> {
        // The place is nobody else's for as long as there is a Weak to it.
        let is = |resource: &Arc<Resource>, refused: &Weak<Resource>| {
            std::ptr::eq(refused.as_ptr(), Arc::as_ptr(resource))
        };
        resource
            .filter(|resource| {
                self.ids != Ids::Out && !self.refused.iter().any(|refused| is(resource, refused))
            })
            .cloned()
    }

    /// A picture that was sent as a resource id came back encoded.
    pub fn worked(&mut self) {
        if self.ids == Ids::Possible {
            self.ids = Ids::Proven;
        }
    }

    /// The host answered a picture that was sent as this resource with an ERROR.
    pub fn refused(&mut self, resource: &Arc<Resource>, code: ErrorCode) -> Refusal {
        match code {
            // The first where the host has the resource, but of another size or layout.
            ErrorCode::INVALID_MESSAGE
            | ErrorCode::RESOURCE_NOT_FOUND
            | ErrorCode::NO_NATIVE_TEXTURE
            | ErrorCode::NO_NATIVE_SURFACE => {}
            _ => return Refusal::Frame,
        }
        if self.wanted == Transfer::ResourceId {
            return Refusal::OnlyWay;
        }
        self.refused.retain(|refused| refused.strong_count() > 0);
        self.refused.push(Arc::downgrade(resource));
        if self.ids == Ids::Possible {
            self.ids = Ids::Out;
            return Refusal::Resource { all: true };
        }
        Refusal::Resource { all: false }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    const RESOLVES: Option<Capabilities> = Some(Capabilities::RESOURCE_IDS);
    const DOES_NOT: Option<Capabilities> = Some(Capabilities::REQUEST_IDS);
    const LEGACY: Option<Capabilities> = None;

    fn known(id: u32) -> Arc<Resource> {
        let id = NonZeroU32::new(id).unwrap();
        Arc::new(Resource { id, size: 1 })
    }

    #[test]
    fn ids_go_where_they_were_announced_or_asked_for_by_name() {
        for (wanted, host, goes) in [
            (Transfer::Auto, RESOLVES, true),
            (Transfer::Auto, DOES_NOT, false),
            (Transfer::Auto, LEGACY, false),
            (Transfer::ResourceId, RESOLVES, true),
            (Transfer::ResourceId, LEGACY, true),
            (Transfer::Pixels, RESOLVES, false),
            (Transfer::Pixels, LEGACY, false),
        ] {
            let choice = Choice::new(wanted, host).unwrap();
            let chosen = choice.choose(Some(&known(7)));
            assert_eq!(chosen.is_some(), goes, "{wanted:?}, {host:?}");
            assert!(choice.choose(None).is_none());
            let only = match wanted {
                Transfer::ResourceId => Some(Way::ResourceId),
                _ => (!goes).then_some(Way::Pixels),
            };
            assert_eq!(choice.only_way(), only, "{wanted:?}, {host:?}");
        }
        assert!(Choice::new(Transfer::ResourceId, DOES_NOT).is_err());
    }

    #[test]
    fn a_host_that_takes_no_id_gets_no_more_of_them() {
        for code in [
            ErrorCode::INVALID_MESSAGE,
            ErrorCode::RESOURCE_NOT_FOUND,
            ErrorCode::NO_NATIVE_TEXTURE,
            ErrorCode::NO_NATIVE_SURFACE,
        ] {
            let mut choice = Choice::new(Transfer::Auto, RESOLVES).unwrap();
            let all = choice.refused(&known(1), code);
            assert_eq!(all, Refusal::Resource { all: true });
            assert!(choice.choose(Some(&known(2))).is_none());
        }
    }

    #[test]
    fn a_host_that_takes_ids_may_refuse_one_buffer() {
        let mut choice = Choice::new(Transfer::Auto, RESOLVES).unwrap();
        choice.worked();
        let bad = known(1);
        let one = choice.refused(&bad, ErrorCode::NO_NATIVE_SURFACE);
        assert_eq!(one, Refusal::Resource { all: false });
        assert!(choice.choose(Some(&bad)).is_none());
        assert!(choice.choose(Some(&known(2))).is_some());
        // Another host, or this one after a loss, may be able to use it.
        let other = Choice::new(Transfer::Auto, RESOLVES).unwrap();
        assert!(other.choose(Some(&bad)).is_some());
    }

    #[test]
    fn other_errors_are_about_the_frame() {
        let mut choice = Choice::new(Transfer::Auto, RESOLVES).unwrap();
        for code in [ErrorCode::ENCODE_FAILED, ErrorCode::INTERNAL] {
            assert_eq!(choice.refused(&known(1), code), Refusal::Frame);
        }
        assert!(choice.choose(Some(&known(1))).is_some());
    }

    #[test]
    fn a_way_that_was_asked_for_by_name_is_not_left() {
        let mut choice = Choice::new(Transfer::ResourceId, LEGACY).unwrap();
        let refusal = choice.refused(&known(1), ErrorCode::RESOURCE_NOT_FOUND);
        assert_eq!(refusal, Refusal::OnlyWay);
        assert!(choice.choose(Some(&known(1))).is_some());
    }
}
