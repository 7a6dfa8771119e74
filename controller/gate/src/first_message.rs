//! Looks at a request's first message without taking it away.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};

use http_body::{Body as HttpBody, Frame};
use http_body_util::BodyExt as _;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Bytes;

/// Longer ones are not looked at further than this; their handlers refuse them.
const MAX_BYTES: usize = 4 << 20;
/// gRPC: one byte that says whether it is compressed, four of length.
const HEADER_BYTES: usize = 5;

/// The first message, as far as it could be read, and the body as it was.
///
/// # Errors
/// When the client hangs up.
pub(super) async fn read(mut body: Body) -> Result<(Vec<u8>, Body), Status> {
    let mut taken: VecDeque<Frame<Bytes>> = VecDeque::new();
    let mut bytes: Vec<u8> = Vec::new();
    while !is_whole(&bytes) && bytes.len() < MAX_BYTES {
        let Some(frame) = body.frame().await else {
            break;
        };
        let frame = frame?;
        if let Some(data) = frame.data_ref() {
            bytes.extend_from_slice(data);
        }
        taken.push_back(frame);
    }
    let message = match bytes.split_at_checked(HEADER_BYTES) {
        // Nobody offered compression.
        Some((header, rest)) if header[0] == 0 => {
            let length = length(header).min(rest.len());
            rest[..length].to_vec()
        }
        _ => vec![],
    };
    Ok((message, Body::new(Again { taken, rest: body })))
}

fn length(header: &[u8]) -> usize {
    u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize
}

fn is_whole(bytes: &[u8]) -> bool {
    bytes.len() >= HEADER_BYTES && bytes.len() - HEADER_BYTES >= length(bytes)
}

/// What was taken, then the rest.
struct Again {
    taken: VecDeque<Frame<Bytes>>,
    rest: Body,
}

impl HttpBody for Again {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match self.taken.pop_front() {
            Some(frame) => Poll::Ready(Some(Ok(frame))),
            None => Pin::new(&mut self.rest).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.taken.is_empty() && self.rest.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::{Full, StreamBody};
    use tokio_stream::StreamExt as _;

    use super::*;

    #[tokio::test]
    async fn message_in_pieces_is_read_and_stays_there() {
        let pieces = [&b"\0\0"[..], b"\0\0\x03a", b"bc\0\0\0\0\x01z"];
        let stream = tokio_stream::iter(pieces.map(Bytes::from_static))
            .map(|piece| Ok::<_, Status>(Frame::data(piece)));
        let (message, body) = read(Body::new(StreamBody::new(stream))).await.unwrap();
        assert_eq!(message, b"abc");
        let all = body.collect().await.unwrap().to_bytes();
        assert_eq!(&all[..], pieces.concat());
    }

    #[tokio::test]
    async fn broken_off_and_empty_bodies_are_passed_on() {
        for bytes in [&b""[..], b"\0\0", b"\0\0\0\0\x09ab"] {
            let full = Full::new(Bytes::from_static(bytes));
            let (_, body) = read(Body::new(full)).await.unwrap();
            assert_eq!(&body.collect().await.unwrap().to_bytes()[..], bytes);
        }
    }
}
