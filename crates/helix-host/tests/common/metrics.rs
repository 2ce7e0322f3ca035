// SPDX-License-Identifier: MIT OR Apache-2.0

//! How a host's figures are read.

use std::io::{Read, Write};
use std::net::TcpStream;

use helix_host::Server;
use helix_protocol::Address;

use super::LONG;

pub fn connect(server: &Server) -> TcpStream {
    connect_to(server.metrics().expect("a host with --metrics"))
}

fn connect_to(address: &Address) -> TcpStream {
    let Address::Tcp { host, port } = address else {
        panic!("{address} is not TCP");
    };
    let stream = TcpStream::connect((host.as_str(), *port)).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream
}

pub fn ask(server: &Server, request: &str) -> String {
    answer(connect(server), request)
}

fn answer(mut stream: TcpStream, request: &str) -> String {
    stream.write_all(request.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

const FIGURES: &str = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";

pub fn figures(server: &Server) -> String {
    ask(server, FIGURES)
}

/// Those of a program.
pub fn figures_at(address: &Address) -> String {
    answer(connect_to(address), FIGURES)
}

/// The value of the line that begins with `name`.
pub fn figure(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let value = line.unwrap_or_else(|| panic!("no {name} in\n{text}"));
    value.trim().parse().unwrap()
}
