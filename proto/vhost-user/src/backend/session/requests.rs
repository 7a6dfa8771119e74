//! The protocol's requests, as the vhost crate hands them over: descriptors made safe, the work
//! done by [`Session`], refusals turned into the protocol's errors.

use std::fs::File;
use std::os::fd::AsRawFd;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{GpuBackend, Result, VhostUserBackendReqHandlerMut};

use faults::Point;

use super::{Refusal, Session, layout_of, misbehaviour};
use crate::inflight::{InflightError, InflightRegion};
use crate::memory::{MAX_REGIONS, Region};
use crate::ring::{RingAddresses, RingFormat};

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        if self.owned {
            return Err(self.refuse("SET_OWNER", Refusal::OwnedAlready));
        }
        self.owned = true;
        Ok(())
    }

    /// Deprecated; "disable all rings".
    fn reset_owner(&mut self) -> Result<()> {
        let result = self.reset_rings();
        self.answer("RESET_OWNER", result)
    }

    fn reset_device(&mut self) -> Result<()> {
        let result = self.reset_rings();
        self.answer("RESET_DEVICE", result)?;
        self.acked_features = 0;
        self.device.reset();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        self.refused_features = self
            .armed(Point::Features)
            .map_or(0, misbehaviour::refused_features);
        Ok(self.offered_features())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let result = self.try_set_features(features);
        self.answer("SET_FEATURES", result)
    }

    fn set_mem_table(
        &mut self,
        ctx: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        files.iter().for_each(close_on_exec);
        let result = self.try_set_mem_table(ctx, &files);
        self.answer("SET_MEM_TABLE", result).map(|()| None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let result = self.try_set_vring_num(index, num);
        self.answer("SET_VRING_NUM", result)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let result = self.try_set_vring_addr(
            index,
            RingAddresses {
                desc: descriptor,
                avail: available,
                used,
            },
        );
        self.answer("SET_VRING_ADDR", result)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let result = self.try_set_vring_base(index, base);
        self.answer("SET_VRING_BASE", result)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let result = self.try_get_vring_base(index);
        let base = self.answer("GET_VRING_BASE", result)?;
        Ok(VhostUserVringState::new(index, base))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        fd.iter().for_each(close_on_exec);
        let result = self.try_set_vring_kick(index, fd);
        self.answer("SET_VRING_KICK", result)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        fd.iter().for_each(close_on_exec);
        let result = self.try_set_vring_call(index, fd);
        self.answer("SET_VRING_CALL", result)
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        fd.iter().for_each(close_on_exec);
        let result = self.try_set_vring_err(index, fd);
        self.answer("SET_VRING_ERR", result)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !protocol_features().bits();
        if unknown != 0 {
            return Err(self.refuse(
                "SET_PROTOCOL_FEATURES",
                Refusal::FeaturesNotOffered(unknown),
            ));
        }
        self.acked_protocol_features = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.device.advertised_queue_num())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let result = self.try_set_vring_enable(index, enable);
        self.answer("SET_VRING_ENABLE", result)
    }

    /// Always `size` bytes, zeroes past the end of the configuration: the frontend of the vhost
    /// crate waits for ever when it gets fewer.
    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let mut config: Vec<u8> = self
            .device
            .config()
            .into_iter()
            .skip(offset as usize)
            .collect();
        config.resize(size as usize, 0);
        Ok(config)
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let result = self.device.write_config(offset, buf).map_err(Refusal::Io);
        self.answer("SET_CONFIG", result)
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(self.refuse("GPU_SET_SOCKET", Refusal::Unsupported("a GPU socket")))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(self.refuse("GET_SHARED_OBJECT", Refusal::Unsupported("a shared object")))
    }

    fn get_inflight_fd(
        &mut self,
        inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        let VhostUserInflight {
            num_queues,
            queue_size,
            ..
        } = *inflight;
        let format = RingFormat::of(self.acked_features);
        let result = match usize::from(num_queues) > self.vrings.len()
            || queue_size > self.device.max_queue_size()
        {
            true => Err(InflightError::BadShape {
                num_queues,
                queue_size,
            }
            .into()),
            false => InflightRegion::create(format, num_queues, queue_size).map_err(Refusal::from),
        };
        let (region, file) = self.answer("GET_INFLIGHT_FD", result)?;
        drop(region);
        let len_bytes = InflightRegion::needed_bytes(format, num_queues, queue_size);
        Ok((
            VhostUserInflight::new(len_bytes, 0, num_queues, queue_size),
            file,
        ))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        close_on_exec(&file);
        let result = self.try_set_inflight_fd(inflight, &file);
        self.answer("SET_INFLIGHT_FD", result)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        close_on_exec(&fd);
        let add = |session: &mut Session| {
            session.require_owner()?;
            let added = Region::map(layout_of(region), &fd)?;
            let table = session
                .memory
                .as_deref()
                .cloned()
                .unwrap_or_default()
                .with(added)?;
            session.use_memory(table)
        };
        let result = add(self);
        self.answer("ADD_MEM_REG", result).map(|()| None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let remove = |session: &mut Session| {
            session.require_owner()?;
            let table = session
                .memory
                .as_deref()
                .cloned()
                .unwrap_or_default()
                .without(&layout_of(region))?;
            session.use_memory(table)
        };
        let result = remove(self);
        self.answer("REM_MEM_REG", result)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(self.refuse(
            "SET_DEVICE_STATE_FD",
            Refusal::Unsupported("device state transfer"),
        ))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(self.refuse(
            "CHECK_DEVICE_STATE",
            Refusal::Unsupported("device state transfer"),
        ))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(self.refuse(
            "GET_SHMEM_CONFIG",
            Refusal::Unsupported("shared device memory"),
        ))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(self.refuse("SET_LOG_BASE", Refusal::Unsupported("dirty logging")))
    }
}

fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE
}

/// The vhost crate receives descriptors without this flag.
fn close_on_exec(file: &File) {
    // SAFETY: F_SETFD takes an integer.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
}
