//! COM1: a 16550 whose output goes to the [`Console`] and whose input comes from anybody who
//! types there.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::console::Console;

/// Input that waits for the guest; more is dropped, as on a real line.
const INPUT_CAPACITY_BYTES: usize = 64 << 10;

/// The serial port.
pub struct SerialPort {
    console: Arc<Console>,
    interrupt: EventFd,
    uart: Mutex<Uart>,
}

struct Uart {
    registers: Serial<InterruptLine, NoEvents, ConsoleWriter>,
    /// What the FIFO has no room for yet.
    input: VecDeque<u8>,
}

impl SerialPort {
    /// A port that signals `interrupt` and writes to `console`.
    ///
    /// # Errors
    /// The eventfd could not be duplicated.
    pub fn new(interrupt: EventFd, console: Arc<Console>) -> io::Result<Self> {
        let uart = Mutex::new(Uart::new(&interrupt, &console)?);
        Ok(Self {
            console,
            interrupt,
            uart,
        })
    }

    /// Types `bytes` into the guest; returns how many were taken.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        let mut uart = self.lock();
        let room = INPUT_CAPACITY_BYTES - uart.input.len();
        let taken = bytes.len().min(room);
        uart.input.extend(&bytes[..taken]);
        uart.refill();
        taken
    }

    /// Back to the power-on state; input that was not read is lost.
    ///
    /// # Errors
    /// The eventfd could not be duplicated.
    pub fn reset(&self) -> io::Result<()> {
        let fresh = Uart::new(&self.interrupt, &self.console)?;
        *self.lock() = fresh;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().expect("no panic while locked")
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let [value] = data {
            let mut uart = self.lock();
            *value = uart.registers.read(offset as u8);
            uart.refill();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let &[value] = data {
            let mut uart = self.lock();
            // The console takes everything, and a full eventfd means that the interrupt is pending already.
            let _ = uart.registers.write(offset as u8, value);
            uart.refill();
        }
    }
}

impl Uart {
    fn new(interrupt: &EventFd, console: &Arc<Console>) -> io::Result<Self> {
        let line = InterruptLine(interrupt.try_clone()?);
        Ok(Self {
            registers: Serial::new(line, ConsoleWriter(console.clone())),
            input: VecDeque::new(),
        })
    }

    fn refill(&mut self) {
        let room = self.registers.fifo_capacity().min(self.input.len());
        if room == 0 {
            return;
        }
        let next: Vec<u8> = self.input.range(..room).copied().collect();
        // It takes nothing in loopback mode.
        let taken = self.registers.enqueue_raw_bytes(&next).unwrap_or(0);
        self.input.drain(..taken);
    }
}

struct InterruptLine(EventFd);

impl Trigger for InterruptLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

struct ConsoleWriter(Arc<Console>);

impl io::Write for ConsoleWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const LINE_STATUS: u64 = 5;
    const DATA_READY: u8 = 1;

    fn port() -> (SerialPort, EventFd, Arc<Console>) {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let console = Arc::new(Console::new(Instant::now()));
        (
            SerialPort::new(interrupt.try_clone().unwrap(), console.clone()).unwrap(),
            interrupt,
            console,
        )
    }

    fn read(port: &SerialPort, offset: u64) -> u8 {
        let mut data = [0];
        port.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn output_reaches_the_console() {
        let (port, _, console) = port();
        port.write(DATA, b"o");
        port.write(DATA, b"k");
        assert_eq!(console.read(0).unwrap().data, b"ok");
    }

    #[test]
    fn input_longer_than_the_fifo_arrives_whole_and_interrupts() {
        let (port, interrupt, _) = port();
        port.write(INTERRUPT_ENABLE, &[1]);
        let typed: Vec<u8> = (0..=255).collect();
        assert_eq!(port.type_in(&typed), 256);
        assert!(interrupt.read().is_ok());
        let mut got = Vec::new();
        while read(&port, LINE_STATUS) & DATA_READY != 0 {
            got.push(read(&port, DATA));
        }
        assert_eq!(got, typed);
    }

    #[test]
    fn input_is_bounded_and_dropped_by_reset() {
        let (port, _, _) = port();
        let flood = vec![b'x'; INPUT_CAPACITY_BYTES + 100];
        assert!(port.type_in(&flood) <= INPUT_CAPACITY_BYTES);
        assert!(port.type_in(&flood) < 100);
        port.reset().unwrap();
        assert_eq!(read(&port, LINE_STATUS) & DATA_READY, 0);
    }
}
