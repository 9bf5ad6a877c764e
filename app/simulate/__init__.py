"""A carrier and a caller to try the service with: no account, no phone, real sockets in real time."""
