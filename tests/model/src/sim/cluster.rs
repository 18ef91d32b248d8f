//! An etcd cluster of three members: one history of a VM's key, and gateways that speak etcd's JSON.
//!
//! The history is linearizable, since that is what etcd promises: a request takes effect at one moment
//! between its coming and its answer. Everything else is up to [`Condition`] and [`Fate`]. A member that
//! is of another cluster, or was restored from a backup, has a history of its own, and whoever puts
//! something there does so for nobody.

use std::io::ErrorKind;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use replication::ownership::Record;
use replication::ownership::etcd::Place;
use serde_json::{Value, json};

/// Of the record.
pub const KEY: &str = "vm1";
/// Members of the cluster.
pub const MEMBERS: usize = 3;
/// Its id, and that of another one.
const CLUSTER: u64 = 0xc1;
const ANOTHER: u64 = 0xc2;
/// Revisions between a member's backup and what an asker knows of the cluster: a put of it does not reach
/// that again. Who has restored less than that cannot be told from the cluster.
const BACKUP_REVISIONS_MIN: i64 = 2;

/// What a member is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub server: usize,
    pub path: String,
    pub body: String,
}

/// What the asker gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Body(Vec<u8>),
    Status(u16, &'static str),
    Lost(ErrorKind),
}

/// How a member is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Condition {
    #[default]
    Well,
    Down,
    /// It takes requests and answers none.
    Silent,
    /// It sees no majority.
    Alone,
    /// Its address is that of a member of another cluster.
    Another,
    /// It has gone on alone from a backup of so many revisions more than the fewest.
    Restored(i64),
}

/// How a request at a member that is well goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Well,
    /// It is answered that it was not carried out.
    Refused,
    /// It never arrives.
    Lost,
    /// It takes effect, and its answer is lost.
    Unheard,
    /// It is lost for the asker, and takes effect later.
    Late,
    /// Something on the way sends it twice, at once or later.
    Repeated,
    RepeatedLater,
    /// The answer is none of etcd's, of one kind or another.
    Malformed(usize),
}

/// Changes of the key, and the revision of the last change of any key.
#[derive(Clone, Debug)]
struct History {
    cluster: u64,
    revision: i64,
    puts: Vec<(i64, Vec<u8>)>,
}

impl History {
    /// Where a cluster begins.
    fn new(cluster: u64) -> Self {
        Self { cluster, revision: 1, puts: vec![] }
    }

    /// A backup of when the cluster was at `revision`.
    fn back_to(&self, revision: i64) -> Self {
        let puts = self.puts.iter().filter(|(at, _)| *at <= revision).cloned().collect();
        Self { cluster: self.cluster, revision, puts }
    }

    fn header(&self) -> Value {
        json!({
            "cluster_id": self.cluster.to_string(), "member_id": "11",
            "revision": self.revision.to_string(), "raft_term": "2",
        })
    }

    /// An answer to a range, with what is zero left out.
    fn range(&self) -> Value {
        let Some((revision, value)) = self.puts.last() else {
            return json!({"header": self.header()});
        };
        let pair = json!({
            "key": STANDARD.encode(KEY), "create_revision": self.puts[0].0.to_string(),
            "mod_revision": revision.to_string(), "version": self.puts.len().to_string(),
            "value": STANDARD.encode(value),
        });
        json!({"header": self.header(), "kvs": [pair], "count": "1"})
    }

    /// Carries a request out. `None`: it is none of the two that the gateway is asked.
    fn serve(&mut self, request: &Request, compares: bool) -> Option<Value> {
        let body: Value = serde_json::from_str(&request.body).ok()?;
        match request.path.as_str() {
            "/v3/kv/range" => {
                // A range that is not linearizable would say so.
                is_range(&body).then(|| self.range())
            }
            "/v3/kv/txn" => {
                let (revision, value) = transaction(&body)?;
                let stands = self.puts.last().map_or(0, |(revision, _)| *revision);
                if compares && stands != revision {
                    let range = json!({"response_range": self.range()});
                    return Some(json!({"header": self.header(), "responses": [range]}));
                }
                self.revision += 1;
                self.puts.push((self.revision, value));
                let revision = json!({"revision": self.revision.to_string()});
                let put = json!({"response_put": {"header": revision}});
                Some(json!({"header": self.header(), "succeeded": true, "responses": [put]}))
            }
            _ => None,
        }
    }
}

/// Whether a range is of the key, and of nothing else.
fn is_range(body: &Value) -> bool {
    *body == json!({"key": STANDARD.encode(KEY)})
}

/// The revision that a transaction compares, and what it puts.
fn transaction(body: &Value) -> Option<(i64, Vec<u8>)> {
    let [compare] = body["compare"].as_array()?.as_slice() else { return None };
    let [put] = body["success"].as_array()?.as_slice() else { return None };
    let [range] = body["failure"].as_array()?.as_slice() else { return None };
    let key = STANDARD.encode(KEY);
    let is_ours = compare["key"] == key.as_str()
        && compare["target"] == "MOD"
        && compare["result"] == "EQUAL"
        && put["request_put"]["key"] == key.as_str()
        && is_range(&range["request_range"]);
    let revision = compare["mod_revision"].as_str()?.parse().ok()?;
    let value = STANDARD.decode(put["request_put"]["value"].as_str()?).ok()?;
    is_ours.then_some((revision, value))
}

/// The cluster, and how its members are.
#[derive(Debug)]
pub struct Cluster {
    history: History,
    members: [Condition; MEMBERS],
    /// Where the history was when a member saw the majority last.
    seen: [i64; MEMBERS],
}

impl Default for Cluster {
    fn default() -> Self {
        Self {
            history: History::new(CLUSTER),
            members: [Condition::Well; MEMBERS],
            seen: [1; MEMBERS],
        }
    }
}

impl Cluster {
    /// The record that stands.
    ///
    /// # Panics
    /// If it is none: whoever puts one is the client that ships.
    #[must_use]
    pub fn standing(&self) -> Option<Record> {
        let (_, value) = self.history.puts.last()?;
        Some(serde_json::from_slice(value).expect("only records are put"))
    }

    pub fn becomes(&mut self, member: usize, condition: Condition) {
        self.members[member] = condition;
        self.seen[member] = self.history.revision;
    }

    /// All are well from now on.
    pub fn mends(&mut self) {
        self.members = [Condition::Well; MEMBERS];
    }

    /// How a member is to whoever asks it: one that is well is alone where most others are not.
    #[must_use]
    pub fn condition(&self, member: usize) -> Condition {
        let well = self.members.iter().filter(|one| **one == Condition::Well).count();
        match self.members[member] {
            Condition::Well if 2 * well <= MEMBERS => Condition::Alone,
            condition => condition,
        }
    }

    /// Another key is changed, as often as that.
    pub fn goes_on(&mut self, changes: i64) {
        self.history.revision += changes;
    }

    /// The cluster carries a request out. `compares`: whether transactions do.
    #[must_use]
    pub fn serves(&mut self, request: &Request, compares: bool) -> Reply {
        reply(self.history.serve(request, compares))
    }

    /// A member that is alone carries a request out all the same: by what it had seen.
    #[must_use]
    pub fn serves_alone(&self, request: &Request) -> Reply {
        let mut history = self.history.back_to(self.seen[request.server]);
        reply(history.serve(request, true))
    }

    /// A member of another cluster, which has about as many revisions.
    #[must_use]
    pub fn serves_elsewhere(&self, request: &Request) -> Reply {
        let revision = self.history.revision;
        reply(History { revision, ..History::new(ANOTHER) }.serve(request, true))
    }

    /// A member from a backup that is older than what the asker knows; it says nothing to one that could not
    /// tell.
    #[must_use]
    pub fn serves_restored(&self, request: &Request, more: i64, known: Option<Place>) -> Reply {
        let known = known.map_or(0, |place| place.revision);
        let revision = known - BACKUP_REVISIONS_MIN - more;
        if revision < 1 {
            return Reply::Lost(ErrorKind::ConnectionRefused);
        }
        reply(self.history.back_to(revision).serve(request, true))
    }
}

fn reply(answer: Option<Value>) -> Reply {
    match answer {
        Some(answer) => Reply::Body(answer.to_string().into_bytes()),
        None => Reply::Status(400, "the gateway knows no such request"),
    }
}

impl Reply {
    /// What a proxy, a stranger or a connection that ends early makes of it.
    #[must_use]
    pub fn malformed(self, how: usize) -> Self {
        let Self::Body(text) = self else { return self };
        let answer: Value = serde_json::from_slice(&text).unwrap_or_default();
        let bare = json!({"header": answer["header"]}).to_string();
        let another = answer.to_string().replace(&STANDARD.encode(KEY), &STANDARD.encode("vm2"));
        Self::Body(match how {
            0 => text[..text.len() / 2].to_vec(),
            1 => b"<html>Welcome</html>".to_vec(),
            2 if another.as_bytes() != text.as_slice() => another.into_bytes(),
            // To a transaction it is neither yes nor no; to a range it would be an answer.
            3 if answer["responses"].is_array() => bare.into_bytes(),
            _ => b"{}".to_vec(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(server: usize) -> Request {
        let body = json!({"key": STANDARD.encode(KEY)}).to_string();
        Request { server, path: "/v3/kv/range".to_owned(), body }
    }

    fn put(revision: i64, value: &str) -> Request {
        let (key, value) = (STANDARD.encode(KEY), STANDARD.encode(value));
        let body = json!({
            "compare": [{"key": key, "target": "MOD", "result": "EQUAL",
                "mod_revision": revision.to_string()}],
            "success": [{"request_put": {"key": key, "value": value}}],
            "failure": [{"request_range": {"key": key}}],
        });
        Request { server: 0, path: "/v3/kv/txn".to_owned(), body: body.to_string() }
    }

    fn json_of(reply: Reply) -> Value {
        let Reply::Body(text) = reply else { panic!("{reply:?}") };
        serde_json::from_slice(&text).unwrap()
    }

    #[test]
    fn of_all_that_compare_one_revision_one_puts() {
        let mut cluster = Cluster::default();
        assert!(json_of(cluster.serves(&range(0), true)).get("kvs").is_none());
        assert_eq!(json_of(cluster.serves(&put(0, "a"), true))["succeeded"], true);
        cluster.goes_on(3);
        let refused = json_of(cluster.serves(&put(0, "b"), true));
        assert!(refused.get("succeeded").is_none());
        let stands = &refused["responses"][0]["response_range"]["kvs"][0];
        assert_eq!(stands["value"], STANDARD.encode("a"));
        assert_eq!(
            (&stands["mod_revision"], &refused["header"]["revision"]),
            (&json!("2"), &json!("5"))
        );
        assert_eq!(json_of(cluster.serves(&put(2, "b"), true))["header"]["revision"], "6");
        let another = Request { path: "/v3/kv/put".to_owned(), ..range(0) };
        assert!(matches!(cluster.serves(&another, true), Reply::Status(400, _)));
    }

    #[test]
    fn histories_of_strangers_are_their_own() {
        let mut cluster = Cluster::default();
        let _ = cluster.serves(&put(0, "a"), true);
        cluster.becomes(1, Condition::Alone);
        cluster.goes_on(4);
        let _ = cluster.serves(&put(2, "b"), true);
        let of = |reply| json_of(reply)["kvs"][0]["value"].clone();
        assert_eq!(of(cluster.serves_alone(&range(1))), STANDARD.encode("a"));
        let known = Some(Place { cluster: CLUSTER, revision: 6 });
        let restored = json_of(cluster.serves_restored(&put(2, "c"), 0, known));
        assert_eq!(restored["succeeded"], true);
        assert_eq!(restored["header"]["revision"], "5", "less than what is known");
        assert_eq!(json_of(cluster.serves_elsewhere(&put(0, "c")))["succeeded"], true);
        assert!(matches!(cluster.serves_restored(&range(1), 0, None), Reply::Lost(_)));
        assert_eq!(of(cluster.serves(&range(0), true)), STANDARD.encode("b"));
    }

    #[test]
    fn a_minority_is_alone() {
        let mut cluster = Cluster::default();
        cluster.becomes(2, Condition::Down);
        assert_eq!(cluster.condition(0), Condition::Well);
        cluster.becomes(1, Condition::Restored(0));
        let all = [0, 1, 2].map(|member| cluster.condition(member));
        assert_eq!(all, [Condition::Alone, Condition::Restored(0), Condition::Down]);
        cluster.mends();
        assert_eq!(cluster.condition(2), Condition::Well);
    }
}
