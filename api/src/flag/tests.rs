//! Flags as users write them.

use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::config::{
    ConsoleConfig, ConsoleOutputMode, CpuTopology, CpusConfig, DiskConfig, HotplugMethod,
    MemoryConfig, NetConfig, TokenBucket, VhostMode,
};
use crate::option::OptionError;
use crate::replication::{
    Compression, ConsoleOutput, Cow, Degrade, DiskMode, RdmaPin, ReceiveReplicaData, ReplicaCard,
    ReplicaDisk, ReplicateData,
};

#[test]
fn cpus_default_their_maximum_to_what_boots() {
    assert_eq!(cpus("").unwrap(), CpusConfig::default());
    let config = cpus("boot=4").unwrap();
    assert_eq!((config.boot_vcpus, config.max_vcpus), (4, 4));
    let config = cpus("boot=2,max=8,topology=2:2:1:2,max_phys_bits=40,nested=off").unwrap();
    assert_eq!((config.boot_vcpus, config.max_vcpus, config.max_phys_bits), (2, 8, 40));
    let topology =
        CpuTopology { threads_per_core: 2, cores_per_die: 2, dies_per_package: 1, packages: 2 };
    assert_eq!(config.topology, Some(topology));
    assert_eq!(config.nested, Some(false));
    let affinity = cpus("boot=2,affinity=[0@[0-2,5],1@[7]]").unwrap().affinity.unwrap();
    assert_eq!((affinity[0].vcpu, affinity[0].host_cpus.as_slice()), (0, &[0, 1, 2, 5][..]));
    assert_eq!((affinity[1].vcpu, affinity[1].host_cpus.as_slice()), (1, &[7][..]));
    assert!(cpus("features=amx").unwrap().features.amx);
    for broken in [
        "4",
        "boot=two",
        "boot=-1",
        "boot=+1",
        "boot=4294967296",
        "topology=1:2:3",
        "topology=1:2:3:4:5",
        "affinity=0",
        "affinity=[0]",
        "affinity=[0@[3-1]]",
        "affinity=[0@[0-99999999999]]",
        "features=avx",
        "cores=2",
    ] {
        assert!(cpus(broken).is_err(), "{broken}");
    }
}

#[test]
fn memory_has_sizes_and_toggles() {
    assert_eq!(memory("").unwrap(), MemoryConfig::default());
    let config =
        memory("size=4G,shared=on,hugepages=on,hugepage_size=1G,prefault=true,thp=off").unwrap();
    assert_eq!(
        config,
        MemoryConfig {
            size: 4 << 30,
            shared: true,
            hugepages: true,
            hugepage_size: Some(1 << 30),
            prefault: true,
            thp: false,
            ..MemoryConfig::default()
        }
    );
    let config = memory("size=1G,hotplug_method=virtio-mem,hotplug_size=1G").unwrap();
    assert_eq!(config.hotplug_method, HotplugMethod::VirtioMem);
    assert!(memory("size=4Q").is_err());
    assert!(memory("size=4G,size=4G").is_err());
    assert!(memory("huge=on").is_err());
}

#[test]
fn a_disk_and_a_card_take_every_key() {
    let text = "path=/a,readonly=on,direct=on,iommu=off,num_queues=4,queue_size=64,\
                vhost_user=on,socket=/s,rate_limit_group=g,id=d,_disable_io_uring=on,\
                _disable_aio=on,pci_segment=1,serial=S,queue_affinity=[0@[1,3],1@[2]],\
                backing_files=on,sparse=off,image_type=raw,bw_size=1M,bw_refill_time=100,\
                ops_size=10,ops_one_time_burst=5,ops_refill_time=200";
    let config = disk(text).unwrap();
    let limit = config.rate_limiter_config.unwrap();
    assert_eq!(
        limit.bandwidth,
        Some(TokenBucket { size: 1 << 20, one_time_burst: None, refill_time: 100 })
    );
    assert_eq!(
        limit.ops,
        Some(TokenBucket { size: 10, one_time_burst: Some(5), refill_time: 200 })
    );
    assert_eq!(config.queue_affinity.as_ref().unwrap()[0].host_cpus, [1, 3]);
    assert_eq!(
        disk("path=\"/a,b\"").unwrap(),
        DiskConfig { path: Some(PathBuf::from("/a,b")), ..DiskConfig::default() }
    );
    assert!(disk("path=").is_err());
    assert!(disk("path=/a,bw_size=1M").is_err());
    let text = "tap=t,ip=10.0.0.1,mask=255.0.0.0,mac=02:00:00:00:00:01,host_mac=02:00:00:00:00:02,\
                mtu=1400,iommu=on,num_queues=4,queue_size=128,vhost_user=on,socket=/s,\
                vhost_mode=server,id=n,fd=[3,4],pci_segment=0,offload_tso=off,offload_ufo=off,\
                offload_csum=off,bw_size=1,bw_refill_time=1";
    let config = net(text).unwrap();
    assert_eq!(config.fds, Some(vec![3, 4]));
    assert_eq!(config.vhost_mode, VhostMode::Server);
    assert_eq!(net("fd=3").unwrap().fds, Some(vec![3]));
    assert_eq!(net("").unwrap(), NetConfig::default());
    assert!(net("ip=localhost").is_err());
    assert!(net("fd=[a]").is_err());
}

#[test]
fn a_console_is_a_word_or_a_place() {
    for (text, mode) in [
        ("off", ConsoleOutputMode::Off),
        ("null", ConsoleOutputMode::Null),
        ("pty", ConsoleOutputMode::Pty),
        ("tty", ConsoleOutputMode::Tty),
    ] {
        assert_eq!(console(text).unwrap(), ConsoleConfig::new(mode));
    }
    assert_eq!(console("file=/a=b").unwrap(), ConsoleConfig::to_file("/a=b"));
    assert_eq!(console("socket=/s").unwrap(), ConsoleConfig::on_socket("/s"));
    assert!(console("tty,iommu=on").unwrap().iommu);
    for broken in ["", "TTY", "file", "file=", "tty,pty", "tty,", "iommu=on", "tty,iommu=maybe"] {
        assert!(console(broken).is_err(), "{broken}");
    }
}

#[test]
fn a_socket_is_a_path_or_a_descriptor() {
    assert_eq!(api_socket("/run/a=b").unwrap(), Place::Path(PathBuf::from("/run/a=b")));
    assert_eq!(api_socket("path=/run/a").unwrap(), Place::Path(PathBuf::from("/run/a")));
    assert_eq!(api_socket("fd=3").unwrap(), Place::Descriptor(3));
    for broken in ["", "path=", "fd=-1", "fd=x", "path=/a,fd=3", "path=/a,mode=1"] {
        assert!(api_socket(broken).is_err(), "{broken}");
    }
    assert_eq!(event_monitor("path=/a").unwrap(), Place::Path(PathBuf::from("/a")));
    assert!(event_monitor("/a").is_err());
}

#[test]
fn a_restore_names_its_source() {
    let config = restore("source_url=file:///a,prefault=on,net_fds=[n1@[3,4],n2@[5]]").unwrap();
    assert_eq!(config.source_url, "file:///a");
    assert!(config.prefault && !config.resume);
    let nets = config.net_fds.unwrap();
    assert_eq!((nets[0].id.as_str(), nets[0].num_fds), ("n1", 2));
    assert_eq!(nets[1].fds, Some(vec![5]));
    for broken in ["", "prefault=on", "source_url=a,net_fds=[n]", "source_url=a,net_fds=[@[3]]"] {
        assert!(restore(broken).is_err(), "{broken}");
    }
}

#[test]
fn platform_and_rng_take_their_keys() {
    let text = "num_pci_segments=2,iommu_segments=[0,1],serial_number=s,uuid=u,\
                oem_strings=[\"a,b\",c],tdx=on";
    let config = platform(text).unwrap();
    assert_eq!(config.oem_strings.unwrap(), ["a,b", "c"]);
    assert_eq!(config.iommu_segments.unwrap(), [0, 1]);
    assert!(platform("iommu_segments=[x]").is_err());
    assert_eq!(rng("src=/dev/random").unwrap().src, PathBuf::from("/dev/random"));
    assert_eq!(rng("").unwrap().src, PathBuf::from("/dev/urandom"));
}

#[test]
fn replication_has_the_documented_defaults() {
    let data: ReplicateData = "destination_url=tcp:b:4000".parse().unwrap();
    let json: ReplicateData = serde_json::from_str("{\"destination_url\":\"tcp:b:4000\"}").unwrap();
    assert_eq!(data, json);
    assert_eq!(data.cow, Cow::Hybrid);
    assert!(data.validate().is_empty());
    let data: ReceiveReplicaData = "receiver_url=tcp:b:4000,serial=file:/a".parse().unwrap();
    assert_eq!(data.serial, Some(ConsoleConfig::to_file("/a")));
    assert!(data.validate().is_empty());
    for broken in [
        "",
        "epoch_ms=5",
        "destination_url=tcp:b:1,cow=maybe",
        "destination_url=tcp:b:1,staging_size=1M",
        "destination_url=tcp:b:1,epoch_ms=5ms",
    ] {
        assert!(broken.parse::<ReplicateData>().is_err(), "{broken}");
    }
    for broken in ["", "receiver_url=a,serial=file=/a", "receiver_url=a,serial=vga", "cow=off"] {
        assert!(broken.parse::<ReceiveReplicaData>().is_err(), "{broken}");
    }
}

#[test]
fn quotes_keep_the_urls_of_an_arbiter_together() {
    const URLS: &str = "etcd:http://a:2379,http://b:2379/vm1";
    let option = format!("destination_url=tcp:b:1,arbiter=\"{URLS}\",timeout_ms=900");
    let data: ReplicateData = option.parse().unwrap();
    assert_eq!(data.arbiter.as_deref(), Some(URLS));
    assert_eq!(data.timeout_ms, 900);
    assert!(data.validate().is_empty());
    assert!(data.to_option().contains(&format!("arbiter=\"{URLS}\",")), "{}", data.to_option());
    // Without them, the error says at which piece it broke.
    let error = option.replace('"', "").parse::<ReplicateData>().unwrap_err();
    assert_eq!(error, OptionError::NoValue("http://b:2379/vm1".to_owned()));
}

fn text() -> impl Strategy<Value = String> {
    ".{0,20}"
}

/// Ids and what stands after them.
fn entries() -> impl Strategy<Value = Vec<(Option<String>, String)>> {
    prop::collection::vec((prop::option::of("[^@]{1,9}"), ".{1,9}"), 0..3)
}

fn a_console() -> impl Strategy<Value = ConsoleConfig> {
    prop_oneof![
        Just(ConsoleConfig::new(ConsoleOutputMode::Off)),
        Just(ConsoleConfig::new(ConsoleOutputMode::Null)),
        Just(ConsoleConfig::new(ConsoleOutputMode::Pty)),
        Just(ConsoleConfig::new(ConsoleOutputMode::Tty)),
        ".{1,20}".prop_map(ConsoleConfig::to_file),
        ".{1,20}".prop_map(ConsoleConfig::on_socket),
    ]
}

prop_compose! {
    fn replicate()(
        destination_url in text(),
        numbers in any::<[u64; 4]>(),
        epoch_max_ms in prop::option::of(any::<u64>()),
        cow in prop::sample::select(vec![Cow::Hybrid, Cow::Protect, Cow::Copy, Cow::Off]),
        connections in any::<u32>(),
        compression in prop::sample::select(vec![
            Compression::Auto, Compression::None, Compression::Delta, Compression::Lz4,
        ]),
        arbiter in any::<[Option<String>; 3]>(),
        alone in (
            prop::sample::select(vec![Degrade::Unprotected, Degrade::Pause]),
            any::<bool>(),
            prop::option::of(text()),
        ),
        tls_dir in prop::option::of(text()),
        disk_mode in prop::sample::select(vec![DiskMode::Replicated, DiskMode::Shared]),
        console_output in prop::sample::select(vec![ConsoleOutput::Hold, ConsoleOutput::Pass]),
        rdma_device in prop::option::of(text()),
        rdma in any::<[Option<u32>; 3]>(),
        rdma_pin in prop::option::of(prop::sample::select(vec![
            RdmaPin::Auto, RdmaPin::On, RdmaPin::Off,
        ])),
        fallback in any::<bool>(),
    ) -> ReplicateData {
        let [epoch_ms, epoch_min_ms, heartbeat_ms, timeout_ms] = numbers;
        let [rdma_port, rdma_gid_index, rdma_depth] = rdma;
        let [arbiter, arbiter_tls_dir, arbiter_credentials] = arbiter;
        let (degrade, reconnect, return_url) = alone;
        ReplicateData {
            destination_url, epoch_ms, epoch_min_ms, epoch_max_ms, cow, connections, compression,
            heartbeat_ms, timeout_ms, arbiter, arbiter_tls_dir, arbiter_credentials, degrade, reconnect, return_url, tls_dir, disk_mode, console_output,
            rdma_device, rdma_port, rdma_gid_index, rdma_depth, rdma_pin, fallback,
        }
    }
}

prop_compose! {
    fn receive()(
        receiver_url in text(),
        numbers in any::<[u64; 3]>(),
        arbiter in any::<[Option<String>; 3]>(),
        tls_dir in prop::option::of(text()),
        serial in prop::option::of(a_console()),
        console in prop::option::of(a_console()),
        disks in entries(),
        net in entries(),
        rdma_device in prop::option::of(text()),
        rdma in any::<[Option<u32>; 3]>(),
        fallback in any::<bool>(),
    ) -> ReceiveReplicaData {
        let [staging_size, heartbeat_ms, timeout_ms] = numbers;
        let [rdma_port, rdma_gid_index, rdma_depth] = rdma;
        let [arbiter, arbiter_tls_dir, arbiter_credentials] = arbiter;
        ReceiveReplicaData {
            receiver_url, staging_size, heartbeat_ms, timeout_ms, arbiter, arbiter_tls_dir,
            arbiter_credentials, tls_dir, serial, console,
            disks: disks
                .into_iter()
                .map(|(id, path)| ReplicaDisk { id, path: path.into() })
                .collect(),
            net: net.into_iter().map(|(id, tap)| ReplicaCard { id, tap }).collect(),
            rdma_device, rdma_port, rdma_gid_index, rdma_depth, fallback,
        }
    }
}

proptest! {
    #[test]
    fn replication_options_are_read_as_they_are_written(data in replicate()) {
        prop_assert_eq!(data.to_option().parse(), Ok(data.clone()));
        let json = serde_json::to_string(&data).unwrap();
        prop_assert_eq!(serde_json::from_str::<ReplicateData>(&json).unwrap(), data);
    }

    #[test]
    fn receive_options_are_read_as_they_are_written(data in receive()) {
        prop_assert_eq!(data.to_option().parse(), Ok(data.clone()));
        let json = serde_json::to_string(&data).unwrap();
        prop_assert_eq!(serde_json::from_str::<ReceiveReplicaData>(&json).unwrap(), data);
    }

    #[test]
    fn no_text_breaks_a_flag(
        text in "((boot|size|path|tap|src|affinity|fd|net_fds|source_url|file|serial)=)?\
                 [\\[\\]@,=\"0-9a-zKM:/ -]{0,40}",
    ) {
        let _ = cpus(&text);
        let _ = memory(&text);
        let _ = disk(&text);
        let _ = net(&text);
        let _ = rng(&text);
        let _ = console(&text);
        let _ = platform(&text);
        let _ = restore(&text);
        let _ = api_socket(&text);
        let _ = event_monitor(&text);
        let _ = text.parse::<ReplicateData>();
        let _ = text.parse::<ReceiveReplicaData>();
    }
}
