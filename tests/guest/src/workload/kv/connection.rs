//! One connection: requests are answered in the order in which they came.

use guest_logic::kv::{FRAME_BYTES, Operation, Request, Response, Status};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::{Socket, State};

use super::journal::{Journal, Offer, Put};

pub struct Connection {
    pub handle: SocketHandle,
    /// Its place among the connections.
    index: usize,
    /// Which of the connections that this place has had it is: an answer to a former one is lost.
    generation: u32,
    /// Puts that wait for their records. Their answers have room in the socket's buffer.
    waiting: usize,
}

/// What a connection works with.
pub struct Store<'a> {
    pub values: &'a mut [u64],
    pub journal: &'a mut Journal,
    pub gets: &'a mut u64,
}

impl Connection {
    #[must_use]
    pub fn new(handle: SocketHandle, index: usize) -> Self {
        Self { handle, index, generation: 0, waiting: 0 }
    }

    /// Answers what can be answered now; whether a client asks the guest to end.
    pub fn serve(&mut self, socket: &mut Socket<'_>, store: &mut Store<'_>, port: u16) -> bool {
        if !socket.is_open() {
            self.generation = self.generation.wrapping_add(1);
            self.waiting = 0;
            // It was just seen to be closed, and a port is not zero.
            let _ = socket.listen(port);
            return false;
        }
        let mut stop = false;
        while self.has_request(socket) && !stop {
            let mut frame = [0; FRAME_BYTES];
            if socket.peek_slice(&mut frame) != Ok(FRAME_BYTES) {
                break;
            }
            match Request::decode(&frame) {
                Ok(request) if request.operation == Operation::Put => {
                    let (connection, generation) = (self.index, self.generation);
                    match store.journal.offer(Put { connection, generation, request }) {
                        Offer::Taken => self.waiting += 1,
                        Offer::Full if self.waiting == 0 => {
                            let response = request.response(Status::NotLogged, request.value);
                            respond(socket, response);
                        }
                        Offer::Full | Offer::Busy => break,
                    }
                }
                // Order: whatever is not a put waits for the puts before it.
                _ if self.waiting > 0 => break,
                Ok(request) if request.operation == Operation::Get => {
                    *store.gets += 1;
                    let value = store.values.get(request.key as usize).copied().unwrap_or(0);
                    respond(socket, request.response(Status::Ok, value));
                }
                Ok(request) => {
                    respond(socket, request.response(Status::Ok, request.value));
                    stop = true;
                }
                Err(bad) => respond(socket, bad.response()),
            }
            // It has been peeked at, so it is there.
            let _ = socket.recv_slice(&mut frame);
        }
        let is_over = socket.state() == State::CloseWait && socket.recv_queue() < FRAME_BYTES;
        if is_over && self.waiting == 0 {
            socket.close();
        }
        stop
    }

    /// Answers a put whose batch has ended.
    pub fn logged(&mut self, socket: &mut Socket<'_>, put: Put, status: Status) {
        if put.generation == self.generation {
            self.waiting -= 1;
            respond(socket, put.request.response(status, put.request.value));
        }
    }

    /// Whether a whole request is there, and room for its answer.
    fn has_request(&self, socket: &Socket<'_>) -> bool {
        let room = socket.send_capacity() - socket.send_queue();
        socket.may_send()
            && socket.recv_queue() >= FRAME_BYTES
            && room >= FRAME_BYTES * (self.waiting + 1)
    }
}

/// Room has been kept for it; a client that has gone is told nothing.
fn respond(socket: &mut Socket<'_>, response: Response) {
    let _ = socket.send_slice(&response.encode());
}
