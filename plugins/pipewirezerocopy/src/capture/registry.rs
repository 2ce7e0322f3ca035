// SPDX-License-Identifier: MIT OR Apache-2.0

//! Which nodes the daemon shows us, which of them is the target, and which were linked.
//!
//! A producer that vanishes does not show as an error of the stream (lesson L2). The registry
//! knows: its `global_remove` names the node that is gone.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use pipewire::registry::{GlobalObject, Listener, RegistryRc};
use pipewire::types::ObjectType;

use super::Target;

/// What is known of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Node {
    pub name: Option<String>,
    pub serial: Option<String>,
    pub class: Option<String>,
}

impl Node {
    /// Whether it can be a source of video, as far as its class says.
    pub fn may_be_video(&self) -> bool {
        self.class
            .as_ref()
            .is_none_or(|class| class.contains("Video"))
    }

    /// The node with that id, for people.
    pub fn describe(&self, id: u32) -> String {
        match &self.name {
            Some(name) => format!("PipeWire node {id} ({name})"),
            None => format!("PipeWire node {id}"),
        }
    }
}

#[derive(Debug, Default)]
struct Nodes {
    known: HashMap<u32, Node>,
    /// Some came since the last look.
    added: bool,
    /// These went since the last look.
    removed: Vec<u32>,
    /// Those that have, or had, a link leading to them.
    fed: HashSet<u32>,
}

/// The daemon's nodes, kept up to date by the registry's events.
pub(super) struct NodeList {
    nodes: Rc<RefCell<Nodes>>,
    _listener: Listener,
    _registry: RegistryRc,
}

impl NodeList {
    pub fn new(registry: RegistryRc) -> Self {
        let nodes = Rc::new(RefCell::new(Nodes::default()));
        let listener = registry
            .add_listener_local()
            .global({
                let nodes = nodes.clone();
                move |global| {
                    let mut nodes = nodes.borrow_mut();
                    if let Some(node) = describe(global) {
                        nodes.known.insert(global.id, node);
                        nodes.added = true;
                    } else if let Some(fed) = end_of_link(global) {
                        nodes.fed.insert(fed);
                    }
                }
            })
            .global_remove({
                let nodes = nodes.clone();
                move |id| {
                    let mut nodes = nodes.borrow_mut();
                    if nodes.known.remove(&id).is_some() {
                        // Another node may get the number.
                        nodes.fed.remove(&id);
                        nodes.removed.push(id);
                    }
                }
            })
            .register();
        Self {
            nodes,
            _listener: listener,
            _registry: registry,
        }
    }

    /// Whether nodes came since the last call, and which ones went.
    pub fn changes(&self) -> (bool, Vec<u32>) {
        let mut nodes = self.nodes.borrow_mut();
        (
            std::mem::take(&mut nodes.added),
            std::mem::take(&mut nodes.removed),
        )
    }

    /// Whether something was linked to a node. It need not be any more.
    pub fn had_link_to(&self, node: u32) -> bool {
        self.nodes.borrow().fed.contains(&node)
    }

    /// The target, if it is there. `known_as` is the name that the node had before it went:
    /// PipeWire reuses ids, so another node may have the id now.
    pub fn find(&self, target: &Target, known_as: Option<&Node>) -> Option<(u32, Node)> {
        find(&self.nodes.borrow().known, target, known_as)
    }
}

type Global<'a> = GlobalObject<&'a pipewire::spa::utils::dict::DictRef>;

/// The node that a link leads to.
fn end_of_link(global: &Global) -> Option<u32> {
    if global.type_ != ObjectType::Link {
        return None;
    }
    global.props?.get("link.input.node")?.parse().ok()
}

fn describe(global: &Global) -> Option<Node> {
    if global.type_ != ObjectType::Node {
        return None;
    }
    let get = |key| {
        global
            .props
            .and_then(|props| props.get(key))
            .map(str::to_owned)
    };
    Some(Node {
        name: get("node.name"),
        serial: get("object.serial"),
        class: get("media.class"),
    })
}

fn find(
    known: &HashMap<u32, Node>,
    target: &Target,
    known_as: Option<&Node>,
) -> Option<(u32, Node)> {
    match target {
        Target::Id(id) => known
            .get(id)
            .filter(|node| known_as.is_none_or(|before| before.name == node.name))
            .map(|node| (*id, node.clone())),
        Target::Object(wanted) => {
            let mut matching: Vec<_> = known
                .iter()
                .filter(|(_, node)| {
                    node.name.as_ref() == Some(wanted) || node.serial.as_ref() == Some(wanted)
                })
                .collect();
            // Several nodes may share a name. Prefer one that can be what is meant, and the
            // newest, which is the one that has come back.
            matching.sort_by_key(|(id, node)| (node.may_be_video(), serial(node), **id));
            matching.pop().map(|(id, node)| (*id, node.clone()))
        }
    }
}

fn serial(node: &Node) -> u64 {
    node.serial
        .as_ref()
        .and_then(|serial| serial.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, serial: &str, class: &str) -> Node {
        Node {
            name: Some(name.into()),
            serial: Some(serial.into()),
            class: Some(class.into()),
        }
    }

    fn known() -> HashMap<u32, Node> {
        HashMap::from([
            (30, node("desk", "41", "Video/Source")),
            (31, node("desk", "57", "Video/Source")),
            (32, node("desk", "99", "Audio/Sink")),
            (33, node("41x", "12", "Video/Source")),
        ])
    }

    #[test]
    fn a_name_finds_the_newest_video_node_of_that_name() {
        let found = find(&known(), &Target::Object("desk".into()), None);
        assert_eq!(found.unwrap().0, 31);
    }

    #[test]
    fn a_serial_finds_its_node() {
        let found = find(&known(), &Target::Object("41".into()), None);
        assert_eq!(found.unwrap().0, 30);
        assert_eq!(find(&known(), &Target::Object("40".into()), None), None);
    }

    #[test]
    fn an_id_that_another_node_has_taken_over_is_not_the_target() {
        let before = node("desk", "3", "Video/Source");
        let other = node("webcam", "3", "Video/Source");
        assert!(find(&known(), &Target::Id(30), Some(&before)).is_some());
        assert!(find(&known(), &Target::Id(30), Some(&other)).is_none());
        assert!(find(&known(), &Target::Id(30), None).is_some());
        assert!(find(&known(), &Target::Id(29), None).is_none());
    }

    #[test]
    fn nodes_are_named_for_people() {
        assert_eq!(Node::default().describe(3), "PipeWire node 3");
        let mutter = node("mutter", "", "");
        assert_eq!(mutter.describe(3), "PipeWire node 3 (mutter)");
        assert_eq!(Target::Object("x".into()).to_string(), "PipeWire node 'x'");
    }

    #[test]
    fn a_node_without_a_class_may_be_anything() {
        assert!(Node::default().may_be_video());
        assert!(!node("", "", "Audio/Sink").may_be_video());
        assert!(node("", "", "Stream/Output/Video").may_be_video());
    }
}
