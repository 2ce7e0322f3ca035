// SPDX-License-Identifier: MIT OR Apache-2.0

//! A PipeWire of our own: the daemon, in a folder of its own, and of a session manager no more than links.

use std::cell::RefCell;
use std::collections::HashMap;
use std::process::{Child, Command};
use std::rc::Rc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pipewire::channel::Sender;
use pipewire::context::ContextRc;
use pipewire::core::CoreRc;
use pipewire::link::Link;
use pipewire::main_loop::MainLoopRc;
use pipewire::properties::properties;
use pipewire::registry::GlobalObject;
use pipewire::types::ObjectType;

use crate::Outcome;

/// The daemon's socket must be there by then.
const LIMIT: Duration = Duration::from_secs(20);

/// What the daemon needs for streams of programs: no device, no session manager.
const CONFIG: &str = "\
context.properties = { core.daemon = true core.name = pipewire-0 }
context.spa-libs = { support.* = support/libspa-support }
context.modules = [
    { name = libpipewire-module-protocol-native }
    { name = libpipewire-module-access }
    { name = libpipewire-module-client-node }
    { name = libpipewire-module-link-factory }
    { name = libpipewire-module-metadata }
]
";

/// A daemon, and somebody who links `NAME` to `NAME-consumer`. All ends when it is dropped.
pub struct Session {
    daemon: Child,
    quit: Option<Sender<()>>,
    links: Option<JoinHandle<()>>,
    folder: tempfile::TempDir,
}

impl Session {
    /// Starts one, for this process to connect to. No other thread may be there yet.
    pub fn start() -> Outcome<Self> {
        let folder = tempfile::tempdir()?;
        let config = folder.path().join("pipewire.conf");
        std::fs::write(&config, CONFIG)?;
        // SAFETY: nobody else reads the environment now: this is the only thread.
        unsafe { std::env::set_var("XDG_RUNTIME_DIR", folder.path()) };
        let daemon = Command::new("pipewire")
            .arg("-c")
            .arg(&config)
            .spawn()
            .map_err(|error| format!("pipewire cannot be started: {error}"))?;
        let mut session = Self {
            daemon,
            quit: None,
            links: None,
            folder,
        };
        let socket = session.folder.path().join("pipewire-0");
        let end = Instant::now() + LIMIT;
        while !socket.exists() {
            if let Some(status) = session.daemon.try_wait()? {
                return Err(format!("pipewire has ended: {status}").into());
            }
            if Instant::now() > end {
                return Err(format!("pipewire has no socket after {LIMIT:?}").into());
            }
            // Nobody tells when it has.
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(session)
    }

    /// Links from now on.
    pub fn link(&mut self) {
        let (quit, receiver) = pipewire::channel::channel();
        self.quit = Some(quit);
        self.links = Some(std::thread::spawn(move || {
            if let Err(error) = link(receiver) {
                println!("nothing is linked: {error}");
            }
        }));
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let (Some(quit), Some(links)) = (self.quit.take(), self.links.take()) {
            let _ = quit.send(());
            let _ = links.join();
        }
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// Nodes by their numbers, their ports, and the links between them.
#[derive(Default)]
struct Seen {
    nodes: HashMap<u32, String>,
    /// With the nodes that they are of.
    outputs: HashMap<u32, u32>,
    inputs: HashMap<u32, u32>,
    links: HashMap<(u32, u32), Link>,
}

impl Seen {
    fn note(
        &mut self,
        core: &CoreRc,
        global: &GlobalObject<&libspa::utils::dict::DictRef>,
    ) -> Outcome<()> {
        let Some(about) = global.props else {
            return Ok(());
        };
        match (&global.type_, about.get("port.direction")) {
            (ObjectType::Node, _) => {
                let name = about.get("node.name").unwrap_or_default();
                self.nodes.insert(global.id, name.to_owned());
            }
            (ObjectType::Port, Some(direction)) => {
                let node = about.get("node.id").unwrap_or_default().parse()?;
                let ports = match direction {
                    "out" => &mut self.outputs,
                    _ => &mut self.inputs,
                };
                ports.insert(global.id, node);
            }
            _ => {}
        }
        for (output, from) in &self.outputs {
            for (input, to) in &self.inputs {
                let names = self.nodes.get(from).zip(self.nodes.get(to));
                let meant = names.is_some_and(|(from, to)| *to == format!("{from}-consumer"));
                if meant && !self.links.contains_key(&(*output, *input)) {
                    let link = core.create_object::<Link>(
                        "link-factory",
                        &properties! {
                            "link.output.node" => from.to_string(),
                            "link.output.port" => output.to_string(),
                            "link.input.node" => to.to_string(),
                            "link.input.port" => input.to_string(),
                        },
                    )?;
                    self.links.insert((*output, *input), link);
                }
            }
        }
        Ok(())
    }

    fn forget(&mut self, id: u32) {
        self.nodes.remove(&id);
        self.outputs.remove(&id);
        self.inputs.remove(&id);
        self.links.retain(|(from, to), _| *from != id && *to != id);
    }
}

fn link(receiver: pipewire::channel::Receiver<()>) -> Outcome<()> {
    pipewire::init();
    let main_loop = MainLoopRc::new(None)?;
    let context = ContextRc::new(&main_loop, None)?;
    let core = context.connect_rc(None)?;
    let registry = core.get_registry()?;
    let seen = Rc::new(RefCell::new(Seen::default()));
    let _listener = registry
        .add_listener_local()
        .global({
            let (seen, core) = (seen.clone(), core.clone());
            move |global| {
                if let Err(error) = seen.borrow_mut().note(&core, global) {
                    println!("a link: {error}");
                }
            }
        })
        .global_remove(move |id| seen.borrow_mut().forget(id))
        .register();
    let quit = main_loop.clone();
    let _receiver = receiver.attach(main_loop.loop_(), move |()| quit.quit());
    main_loop.run();
    Ok(())
}
