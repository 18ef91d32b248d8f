//! Bytes from outside that are no state: an error, never a panic or a large allocation.

mod common;

use common::Machine;
use hypervisor::state::{Blob, MSRS_MAX, Msr, StateError, XSAVE_SIZE_MAX};
use hypervisor::{VcpuState, VmState};

fn saved() -> (VcpuState, VmState) {
    let mut machine = Machine::new(1, &[]);
    let vcpu = machine.vcpus[0].save().unwrap();
    (vcpu, machine.vm.save_state().unwrap())
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = postcard::to_stdvec(&saved()).unwrap();
    for len in 0..bytes.len() {
        assert!(postcard::from_bytes::<(VcpuState, VmState)>(&bytes[..len]).is_err(), "{len}");
    }
    let json = serde_json::to_string(&saved()).unwrap();
    for len in (0..json.len()).step_by(7) {
        assert!(serde_json::from_str::<(VcpuState, VmState)>(&json[..len]).is_err(), "{len}");
    }
}

#[test]
fn structures_of_another_length_are_errors() {
    let json = serde_json::to_value(saved().0).unwrap();
    let text = json["regs"].as_str().unwrap().to_owned();
    for wrong in [
        &text[2..],
        &format!("{text}00"),
        &format!("{text}0"),
        &format!("{}g", &text[1..]),
        "",
        "zz",
    ] {
        let mut other = json.clone();
        other["regs"] = wrong.into();
        assert!(serde_json::from_value::<VcpuState>(other).is_err(), "{wrong:.10}");
    }
}

#[test]
fn lists_without_end_are_errors() {
    let (mut state, _) = saved();
    let msr = Msr { index: 1, data: 2 };
    state.msrs = vec![msr; MSRS_MAX + 1];
    assert_eq!(state.validate(), Err(StateError::TooManyMsrs(MSRS_MAX + 1)));
    let bytes = postcard::to_stdvec(&state).unwrap();
    assert!(postcard::from_bytes::<VcpuState>(&bytes).is_err());
    // A length of 2^63 with nothing behind it.
    let claim = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f];
    assert!(postcard::from_bytes::<Blob>(&claim).is_err());
    let long = postcard::to_stdvec(&Blob(vec![0; XSAVE_SIZE_MAX + 1])).unwrap();
    assert!(postcard::from_bytes::<Blob>(&long).is_err());
}

#[test]
fn what_the_kernel_would_trust_is_checked() {
    let mut machine = Machine::new(1, &[]);
    let (good, vm) = saved();
    let mut wrongs = Vec::new();
    let mut with = |change: &dyn Fn(&mut VcpuState)| {
        let mut state = good.clone();
        change(&mut state);
        assert!(state.validate().is_err());
        wrongs.push(state);
    };
    with(&|state| state.xsave.0.truncate(4095));
    with(&|state| state.xsave.0.resize(XSAVE_SIZE_MAX + 1, 0));
    with(&|state| state.xcrs.0.nr_xcrs = 17);
    with(&|state| state.nested = Some(Blob(vec![0; 8])));
    // A header that promises more than there is.
    with(&|state| {
        let mut nested = vec![0; 128];
        nested[4..8].copy_from_slice(&8320_u32.to_le_bytes());
        state.nested = Some(Blob(nested));
    });
    for wrong in wrongs {
        assert!(machine.vcpus[0].restore(&wrong).is_err());
    }
    let mut swapped = vm;
    swapped.irqchips.swap(0, 2);
    assert!(machine.vm.restore_state(&swapped).is_err());
}

#[test]
fn flipped_bytes_never_panic() {
    let (vcpu, vm) = saved();
    let bytes = postcard::to_stdvec(&(&vcpu, &vm)).unwrap();
    let mut machine = Machine::new(1, &[]);
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        // xorshift64: any state but zero will do.
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let len = u64::try_from(bytes.len()).unwrap();
    for round in 0..400 {
        let mut bytes = bytes.clone();
        for _ in 0..=next() % 8 {
            let [value, ..] = next().to_le_bytes();
            bytes[usize::try_from(next() % len).unwrap()] = value;
        }
        if let Ok((vcpu, vm)) = postcard::from_bytes::<(VcpuState, VmState)>(&bytes) {
            // KVM may take it or not: what counts is that we come back.
            let _ = machine.vm.restore_state(&vm);
            let _ = machine.vcpus[0].restore(&vcpu);
        }
        if round % 50 == 49 {
            machine = Machine::new(1, &[]);
        }
    }
}
