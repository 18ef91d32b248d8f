//! User and password.

use std::fs;

use super::*;

const USER: &str = "vmm";
const PASSWORD: &str = "se:cret";

impl Client<Servers> {
    fn token(&self) -> Option<String> {
        self.gateway.token.borrow().clone()
    }

    fn set_token(&self, token: &str) {
        self.gateway.token.replace(Some(token.to_owned()));
    }
}

/// A cluster that lets `USER` write `KEY` and nothing else.
fn guarded(cluster: &Cluster) -> Result<()> {
    let call = |path: &str, body: Value| gateway(cluster, path, &body, &[]).map(drop);
    call("/v3/auth/user/add", json!({"name": "root", "password": "root"}))?;
    call("/v3/auth/role/add", json!({"name": "root"}))?;
    call("/v3/auth/user/grant", json!({"user": "root", "role": "root"}))?;
    call("/v3/auth/user/add", json!({"name": USER, "password": PASSWORD}))?;
    call("/v3/auth/role/add", json!({"name": "one"}))?;
    let permission = json!({"permType": "READWRITE", "key": encoded(KEY.as_bytes())});
    call("/v3/auth/role/grant", json!({"name": "one", "perm": permission}))?;
    call("/v3/auth/user/grant", json!({"user": USER, "role": "one"}))?;
    call("/v3/auth/enable", json!({}))
}

fn access(cluster: &Cluster, line: &str) -> Result<Access> {
    let path = cluster.folder().join("credentials");
    fs::write(&path, line)?;
    Ok(Access { credentials: Some(path), ..Access::default() })
}

#[test]
fn a_user_with_a_password_owns() -> Result<()> {
    let cluster = Cluster::start(1)?;
    guarded(&cluster)?;
    let url = cluster.arbiter(KEY);
    let vm = vm();
    // Nobody, a stranger, a wrong password; a key that is another's.
    let refused = arbiter(&url)?.read().unwrap_err().to_string();
    assert!(refused.contains("user name is empty"), "{refused}");
    for line in ["vmm:secret", "nobody:se:cret\n"] {
        let error = arbiter_with(&url, access(&cluster, line)?)?.read().unwrap_err().to_string();
        assert!(error.contains("not accepted") && error.contains(&cluster.url(0)), "{error}");
        assert!(!error.contains("cret"), "it says the password: {error}");
    }
    let good = access(&cluster, "vmm:se:cret\n")?;
    let other = arbiter_with(&cluster.arbiter("vm2"), good.clone())?;
    let error = other.compare_and_swap(Generation(0), &solo(1, vm)).unwrap_err().to_string();
    assert!(error.contains("permission denied"), "{error}");
    let arbiter = arbiter_with(&url, good)?;
    assert_eq!(arbiter.read()?, None);
    assert_eq!(arbiter.compare_and_swap(Generation(0), &solo(1, vm))?, Outcome::Won);
    Ok(())
}

#[test]
fn a_token_that_is_not_accepted_any_more_is_renewed() -> Result<()> {
    let cluster = Cluster::start(1)?;
    guarded(&cluster)?;
    let arbiter = arbiter_with(&cluster.arbiter(KEY), access(&cluster, "vmm:se:cret")?)?;
    let vm = vm();
    assert_eq!(arbiter.compare_and_swap(Generation(0), &solo(1, vm))?, Outcome::Won);
    // All tokens end with the protection, as one does that expires.
    let before = arbiter.client.token().context("it has not logged in")?;
    let root = json!({"name": "root", "password": "root"});
    let root = gateway(&cluster, "/v3/auth/authenticate", &root, &[])?["token"].clone();
    let root = [("Authorization", root.as_str().context("no token")?)];
    gateway(&cluster, "/v3/auth/disable", &json!({}), &root)?;
    gateway(&cluster, "/v3/auth/enable", &json!({}), &[])?;
    let key = json!({"key": encoded(KEY.as_bytes())});
    let old = [("Authorization", before.as_str())];
    assert!(gateway(&cluster, "/v3/kv/range", &key, &old).is_err(), "the old token is accepted");
    assert_eq!(arbiter.compare_and_swap(Generation(1), &solo(2, vm))?, Outcome::Won);
    assert_ne!(arbiter.client.token(), Some(before));
    // One that goes bad between the read and the swap: unknown, then read and owned.
    arbiter.client.set_token("nonsense.1");
    let calls = arbiter.client.calls()?;
    let error = calls.swap(0, KEY.as_bytes(), 1, b"x").unwrap_err();
    assert!(matches!(error, EtcdError::Unknown(..)), "{error}");
    assert_eq!(arbiter.client.token(), None);
    assert_eq!(claim(&arbiter, 2, solo(3, vm)), (Verdict::Owned(Generation(3)), 0));
    Ok(())
}

#[test]
fn credentials_are_one_line_of_a_file() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("credentials");
    let open = || {
        let access = Access { credentials: Some(path.clone()), ..Access::default() };
        arbiter_with("etcd:http://127.0.0.1:1", access)
    };
    let missing = open().unwrap_err().to_string();
    assert!(missing.contains("credentials") && missing.contains("No such file"), "{missing}");
    let long = "u:".to_owned() + &"p".repeat(4096);
    for line in ["", "user", ":password", "user:a\nb:c", "user:\0", &long] {
        fs::write(&path, line)?;
        assert!(open().is_err(), "{line:?}");
    }
    for line in ["user:", "user:a:b\r\n", "u:p\n"] {
        fs::write(&path, line)?;
        open().with_context(|| format!("{line:?}"))?;
    }
    Ok(())
}
