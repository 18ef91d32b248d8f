//! An independent client, generated from upstream's own description of the interface, drives a
//! VM without knowing whose VMM it talks to.

use anyhow::{Context, Result, bail};
use cloud_hypervisor_client::apis::{DefaultApi, Error};
use cloud_hypervisor_client::models::{self, VmState};
use cloud_hypervisor_client::{SocketBasedApiClient, socket_based_api_client};
use understudy_tests::scene::{self, LIMIT, MEMORY};
use understudy_tests::serial::Serial;

const VERIFY: &str = "workload=verify tick_ms=20";

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// The status and the body of a refusal.
fn refusal<T>(answer: Result<T, Error>) -> Result<(u16, String)> {
    match answer {
        Err(Error::Api(error)) => Ok((error.code.as_u16(), error.body)),
        Err(error) => Err(error).context("the client failed otherwise"),
        Ok(_) => bail!("what should be refused was accepted"),
    }
}

async fn state(client: &SocketBasedApiClient) -> Result<VmState> {
    Ok(client.vm_info_get().await?.state)
}

#[test]
fn a_whole_life() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut vmm = scene::idle(folder.path(), "vmm")?;
    let client = socket_based_api_client(vmm.socket());
    let config: models::VmConfig = serde_json::from_value(scene::config(folder.path(), VERIFY))?;
    runtime()?.block_on(async {
        let ping = client.vmm_ping_get().await?;
        assert_eq!(ping.pid, Some(i64::from(vmm.pid())));
        assert_eq!(refusal(client.vm_info_get().await)?.0, 404);
        assert_eq!(refusal(client.boot_vm().await)?.0, 404);
        client.create_vm(config.clone()).await?;
        assert_eq!(state(&client).await?, VmState::Created);
        assert_eq!(refusal(client.create_vm(config.clone()).await)?.0, 500);
        client.boot_vm().await?;
        let info = client.vm_info_get().await?;
        assert_eq!(info.state, VmState::Running);
        assert_eq!(info.memory_actual_size, Some(i64::try_from(MEMORY)?));
        assert_eq!(info.config.payload.cmdline.as_deref(), Some(VERIFY));
        let mut serial = Serial::connect(&folder.path().join("vm.serial"), LIMIT)?;
        serial.wait_more("verify ok", 3, LIMIT)?;
        client.pause_vm().await?;
        assert_eq!(state(&client).await?, VmState::Paused);
        assert_eq!(refusal(client.pause_vm().await)?.0, 500);
        let url = format!("file://{}", folder.path().join("snapshot").display());
        let snapshot = models::VmSnapshotConfig { destination_url: Some(url.clone()) };
        client.vm_snapshot_put(snapshot).await?;
        client.resume_vm().await?;
        assert_eq!(state(&client).await?, VmState::Running);
        let counters = client.vm_counters_get().await?;
        assert!(counters.contains_key("__serial"), "{counters:?}");
        client.shutdown_vm().await?;
        assert_eq!(state(&client).await?, VmState::Created);
        client.delete_vm().await?;
        let restore =
            models::RestoreConfig { resume: Some(true), ..models::RestoreConfig::new(url) };
        client.vm_restore_put(restore).await?;
        assert_eq!(state(&client).await?, VmState::Running);
        serial = Serial::connect(&folder.path().join("vm.serial"), LIMIT)?;
        serial.wait_more("verify ok", 3, LIMIT)?;
        client.reboot_vm().await?;
        client.power_button_vm().await?;
        let (status, body) = refusal(client.vm_resize_put(models::VmResize::new()).await)?;
        assert_eq!(status, 404, "{body}");
        client.shutdown_vmm().await?;
        anyhow::Ok(())
    })?;
    assert_eq!(vmm.wait_exit(LIMIT)?.code(), Some(0), "{}", vmm.log());
    Ok(())
}
