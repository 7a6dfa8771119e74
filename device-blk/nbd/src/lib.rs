//! Network block devices: the protocol, a client that reconnects, a server that fences.
