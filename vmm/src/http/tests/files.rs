//! The socket's file.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use super::*;
use crate::http::{HttpError, serve};

fn start(path: &std::path::Path) -> Result<HttpServer, HttpError> {
    let (calls, _) = unbounded();
    serve(ApiSocket::Path(path.to_owned()), calls)
}

#[test]
fn only_this_user_may_connect_and_the_file_goes_with_the_server() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("api.sock");
    let server = start(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
    drop(server);
    assert!(!path.exists());
}

#[test]
fn a_stale_socket_is_replaced() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("api.sock");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let _server = start(&path).unwrap();
    UnixStream::connect(&path).unwrap();
}

#[test]
fn a_socket_in_use_is_left_alone() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("api.sock");
    let _first = start(&path).unwrap();
    let error = start(&path).unwrap_err();
    assert!(matches!(error, HttpError::InUse(_)), "{error:?}");
    UnixStream::connect(&path).unwrap();
}

#[test]
fn a_file_that_is_no_socket_is_left_alone() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("precious");
    fs::write(&path, "data").unwrap();
    let error = start(&path).unwrap_err();
    assert!(matches!(error, HttpError::NotSocket(_)), "{error:?}");
    assert_eq!(fs::read(&path).unwrap(), b"data");
}

#[test]
fn the_socket_of_a_successor_is_left_alone() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("api.sock");
    let server = start(&path).unwrap();
    // Moved, not removed: the file system must not give the same inode number again.
    fs::rename(&path, directory.path().join("old.sock")).unwrap();
    let _successor = UnixListener::bind(&path).unwrap();
    drop(server);
    UnixStream::connect(&path).unwrap();
}

#[test]
fn a_place_that_does_not_exist_is_named() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("missing/api.sock");
    let error = start(&path).unwrap_err();
    assert!(matches!(error, HttpError::Bind { .. }), "{error:?}");
    assert!(error.to_string().contains("missing/api.sock"));
}
