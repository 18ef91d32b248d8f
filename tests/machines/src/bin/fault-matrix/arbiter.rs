//! The arbiter of a pair, and what can be done to it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use etcd_server::{Cluster, request};
use serde_json::{Value, json};
use understudy_tests::network::Namespace;
use understudy_tests::scene;

use crate::world::{ARBITER, Host, Place, World};

/// The pair's key in etcd, and the same in base64, as the gateway wants it.
const KEY: &str = "pair";
const KEY_ENCODED: &str = "cGFpcg==";

/// What kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// A directory that both hosts have mounted.
    File,
    /// One etcd server.
    Etcd,
    /// Three that are a cluster.
    Etcd3,
    /// A person decides.
    None,
}

impl Kind {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "file:",
            Self::Etcd => "etcd:",
            Self::Etcd3 => "etcd:, three members",
            Self::None => "none",
        }
    }
}

/// One that runs.
pub enum Arbiter {
    File {
        /// Where the records are.
        storage: PathBuf,
        /// Where both hosts see them.
        directory: PathBuf,
    },
    Etcd(Cluster),
    None,
}

/// Runs something in a namespace on the calling thread: a server that it starts lives as long as that.
fn inside<T>(namespace: &Namespace, run: impl FnOnce() -> Result<T>) -> Result<T> {
    let own = Namespace::own()?;
    namespace.enter()?;
    let done = run();
    own.enter()?;
    done
}

impl Arbiter {
    /// Makes one in `folder`, whose servers live as long as the calling thread.
    pub fn new(kind: Kind, folder: &Path, world: &World) -> Result<Self> {
        let members = match kind {
            Kind::File => {
                let (storage, directory) = (folder.join("storage"), folder.join("arbiter"));
                // A row may have mounted something there.
                std::fs::create_dir_all(&storage)?;
                std::fs::create_dir(&directory)?;
                for host in [&world.a, &world.b] {
                    // Where the storage is away a host has an empty directory of its own, as with mount
                    // points of two machines.
                    let own = format!("-t tmpfs none {}", directory.display());
                    host.mounts.run("mount", &own)?;
                    mount(host, &storage, &directory)?;
                }
                return Ok(Self::File { storage, directory });
            }
            Kind::Etcd => 1,
            Kind::Etcd3 => 3,
            Kind::None => return Ok(Self::None),
        };
        let address = ARBITER.parse()?;
        inside(&world.arbiter, || Cluster::start_on(members, address)).map(Self::Etcd)
    }

    /// As the option `arbiter` takes it.
    #[must_use]
    pub fn url(&self) -> Option<String> {
        match self {
            Self::File { directory, .. } => Some(format!("file:{}", directory.display())),
            Self::Etcd(cluster) => Some(cluster.arbiter(KEY)),
            Self::None => None,
        }
    }

    /// A host does not reach it any more: its storage is unmounted there, or the network is cut.
    pub fn cut(&self, world: &World, from: Place) -> Result<()> {
        match self {
            Self::File { directory, .. } => {
                let arguments = format!("-l {}", directory.display());
                host(world, from)?.mounts.run("umount", &arguments)
            }
            Self::Etcd(_) => world.cut(from, Place::Arbiter),
            Self::None => bail!("there is none"),
        }
    }

    /// The host that was cut off reaches it again.
    pub fn heal(&self, world: &World, from: Place) -> Result<()> {
        match self {
            Self::File { storage, directory } => mount(host(world, from)?, storage, directory),
            Self::Etcd(_) => world.mend(from, Place::Arbiter),
            Self::None => bail!("there is none"),
        }
    }

    /// It is gone: unmounted on both hosts, or all its servers killed.
    pub fn lose(&mut self, world: &World) -> Result<()> {
        match self {
            Self::Etcd(cluster) => inside(&world.arbiter, || {
                (0..cluster.members()).try_for_each(|member| cluster.kill(member))
            }),
            _ => self.cut(world, Place::A).and_then(|()| self.cut(world, Place::B)),
        }
    }

    /// It is back, with all that it knew.
    pub fn restore(&mut self, world: &World) -> Result<()> {
        match self {
            Self::Etcd(cluster) => inside(&world.arbiter, || {
                (0..cluster.members()).try_for_each(|member| cluster.restart(member))?;
                cluster.wait_serving()
            }),
            _ => self.heal(world, Place::A).and_then(|()| self.heal(world, Place::B)),
        }
    }

    /// How many records it has had, which are numbered without a gap.
    pub fn records(&self, world: &World) -> Result<usize> {
        match self {
            Self::File { storage, .. } => Ok(scene::records(storage)?.len()),
            Self::Etcd(cluster) => inside(&world.arbiter, || written(cluster)),
            Self::None => Ok(0),
        }
    }

    fn cluster(&mut self) -> Result<&mut Cluster> {
        match self {
            Self::File { .. } => bail!("a directory has no servers"),
            Self::None => bail!("there is none"),
            Self::Etcd(cluster) => Ok(cluster),
        }
    }

    /// SIGKILL of the member that leads; its number.
    pub fn kill_leader(&mut self, world: &World) -> Result<usize> {
        let cluster = self.cluster()?;
        inside(&world.arbiter, || {
            let leader = cluster.leader()?;
            cluster.kill(leader).map(|()| leader)
        })
    }

    /// Starts a member that was killed, and waits until all that live serve.
    pub fn restart(&mut self, world: &World, member: usize) -> Result<()> {
        let cluster = self.cluster()?;
        inside(&world.arbiter, || cluster.restart(member).and_then(|()| cluster.wait_serving()))
    }
}

fn host(world: &World, place: Place) -> Result<&Host> {
    match place {
        Place::A => Ok(&world.a),
        Place::B => Ok(&world.b),
        Place::Arbiter => bail!("the arbiter is not cut from itself"),
    }
}

fn mount(host: &Host, storage: &Path, directory: &Path) -> Result<()> {
    let arguments = format!("--bind {} {}", storage.display(), directory.display());
    host.mounts.run("mount", &arguments)
}

/// How often the key was written; what stands is to be the record of that generation.
fn written(cluster: &Cluster) -> Result<usize> {
    let body = json!({"key": KEY_ENCODED}).to_string();
    let mut last = None;
    // A member may be dead.
    for member in 0..cluster.members() {
        match request(cluster.client(member).into(), "POST", "/v3/kv/range", &[], &body) {
            Ok((200, text)) => {
                let answer: Value = serde_json::from_str(&text)?;
                let version = answer["kvs"][0]["version"].as_str().unwrap_or("0");
                return version.parse().with_context(|| format!("etcd answers {text}"));
            }
            Ok((status, text)) => last = Some(format!("{status}: {text}")),
            Err(error) => last = Some(format!("{error:#}")),
        }
    }
    ensure!(last.is_none(), "No member of etcd answers: {}", last.unwrap_or_default());
    Ok(0)
}
