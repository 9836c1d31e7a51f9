//! Just enough HTTP/1.1: one request a connection, no request bodies.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use super::answer::{self, Answer};
use super::{Fault, Seen, Shared};

/// A client that says nothing is dropped.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longest head of a request.
const LONGEST_HEAD: u64 = 64 << 10;

/// Reads one request, answers it, closes.
pub(super) fn serve(stream: TcpStream, shared: &Shared, cdn: bool) {
    // A client that went away is no failure of the server's.
    let _ = answer_one(stream, shared, cdn);
}

fn answer_one(mut stream: TcpStream, shared: &Shared, cdn: bool) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let Some(seen) = read_request(&stream, cdn)? else {
        return Ok(());
    };
    let line = format!("{} {}", seen.method, seen.path);
    let faults = {
        let mut state = shared.state();
        state.seen.push(seen.clone());
        let mut hit = Vec::new();
        for (part, fault, left) in &mut state.faults {
            if *left > 0 && line.contains(part.as_str()) {
                *left -= 1;
                hit.push(fault.clone());
            }
        }
        hit
    };

    let ranged = !faults.contains(&Fault::IgnoreRange);
    let mut answer = answer::to(&seen, shared, ranged);
    let mut cut = None;
    for fault in faults {
        match fault {
            Fault::Status(code) => answer = Answer::bare(code),
            Fault::CutAfter(bytes) => cut = Some(bytes),
            Fault::IgnoreRange => {}
            Fault::Corrupt => answer.flip(),
            Fault::Drop => return Ok(()),
            Fault::Stall(time) => std::thread::sleep(time),
            Fault::Header(name, value) => answer.set(name, value),
        }
    }
    write_answer(&mut stream, &answer, seen.method == "HEAD", cut)
}

fn read_request(stream: &TcpStream, cdn: bool) -> io::Result<Option<Seen>> {
    let mut reader = BufReader::new(stream.take(LONGEST_HEAD));
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace();
    let (Some(method), Some(path)) = (words.next(), words.next()) else {
        return Ok(None);
    };
    let mut seen = Seen {
        method: method.to_owned(),
        path: path.to_owned(),
        range: None,
        authorization: None,
        cdn,
    };
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header)? == 0 {
            return Ok(None);
        }
        let Some((name, value)) = header.trim_end().split_once(':') else {
            return Ok(Some(seen));
        };
        let value = Some(value.trim().to_owned());
        match name.to_ascii_lowercase().as_str() {
            "range" => seen.range = value,
            "authorization" => seen.authorization = value,
            _ => {}
        }
    }
}

fn write_answer(
    stream: &mut TcpStream,
    answer: &Answer,
    head_only: bool,
    cut: Option<usize>,
) -> io::Result<()> {
    let mut head = format!("HTTP/1.1 {} {}\r\n", answer.status, answer.reason());
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str(&format!(
        "Content-Length: {}\r\nConnection: close\r\n\r\n",
        answer.body.len()
    ));
    stream.write_all(head.as_bytes())?;
    if !head_only {
        let sent = cut.unwrap_or(usize::MAX).min(answer.body.len());
        stream.write_all(&answer.body[..sent])?;
    }
    stream.flush()?;
    stream.shutdown(Shutdown::Write)?;
    // Closing with unread input would reset the connection and lose what was sent.
    stream.set_read_timeout(Some(Duration::from_millis(500)))?;
    let _ = io::copy(&mut stream.take(LONGEST_HEAD), &mut io::sink());
    Ok(())
}
