//! vCPUs of x86-64.

use crate::{Description, Device, Error, Fields, Table, layout};

layout! {
    /// What every kind of vCPU has.
    pub struct CpuCommon = "cpu_common", version 1 {
        halted: u32;
        interrupt_request: u32;
    }
}

layout! {
    /// A vCPU of x86-64: registers, and what the processor keeps beside them.
    pub struct Cpu = "cpu", version 12, minimum 11 {
        regs as "env.regs": [u64; 16];
        eip as "env.eip": u64;
        eflags as "env.eflags": u64;
        hflags as "env.hflags": u32;
        fpuc as "env.fpuc": u16;
        fpus as "env.fpus_vmstate": u16;
        fptag as "env.fptag_vmstate": u16;
        fpregs_format as "env.fpregs_format_vmstate": u16;
        fpregs as "env.fpregs": [FpRegister; 8];
        segs as "env.segs": [Segment; 6];
        ldt as "env.ldt": Segment;
        tr as "env.tr": Segment;
        gdt as "env.gdt": Segment;
        idt as "env.idt": Segment;
        sysenter_cs as "env.sysenter_cs": u32;
        sysenter_esp as "env.sysenter_esp": u64;
        sysenter_eip as "env.sysenter_eip": u64;
        cr0 as "env.cr[0]": u64;
        cr2 as "env.cr[2]": u64;
        cr3 as "env.cr[3]": u64;
        cr4 as "env.cr[4]": u64;
        dr as "env.dr": [u64; 8];
        a20_mask as "env.a20_mask": i32;
        mxcsr as "env.mxcsr": u32;
        xmm as "env.xmm_regs[0]": [XmmRegister; 16];
        efer as "env.efer": u64;
        star as "env.star": u64;
        lstar as "env.lstar": u64;
        cstar as "env.cstar": u64;
        fmask as "env.fmask": u64;
        kernelgsbase as "env.kernelgsbase": u64;
        smbase as "env.smbase": u32;
        pat as "env.pat": u64;
        hflags2 as "env.hflags2": u32;
        vm_hsave as "env.vm_hsave": u64;
        vm_vmcb as "env.vm_vmcb": u64;
        tsc_offset as "env.tsc_offset": u64;
        intercept as "env.intercept": u64;
        intercept_cr_read as "env.intercept_cr_read": u16;
        intercept_cr_write as "env.intercept_cr_write": u16;
        intercept_dr_read as "env.intercept_dr_read": u16;
        intercept_dr_write as "env.intercept_dr_write": u16;
        intercept_exceptions as "env.intercept_exceptions": u32;
        v_tpr as "env.v_tpr": u8;
        mtrr_fixed as "env.mtrr_fixed": [u64; 11];
        mtrr_deftype as "env.mtrr_deftype": u64;
        mtrr_var as "env.mtrr_var": [MtrrRange; 8];
        interrupt_injected as "env.interrupt_injected": i32;
        mp_state as "env.mp_state": u32;
        tsc as "env.tsc": u64;
        exception_nr as "env.exception_nr": i32;
        soft_interrupt as "env.soft_interrupt": u8;
        nmi_injected as "env.nmi_injected": u8;
        nmi_pending as "env.nmi_pending": u8;
        has_error_code as "env.has_error_code": u8;
        sipi_vector as "env.sipi_vector": u32;
        mcg_cap as "env.mcg_cap": u64;
        mcg_status as "env.mcg_status": u64;
        mcg_ctl as "env.mcg_ctl": u64;
        mce_banks as "env.mce_banks": Table<u64, 40>;
        tsc_aux as "env.tsc_aux": u64;
        system_time_msr as "env.system_time_msr": u64;
        wall_clock_msr as "env.wall_clock_msr": u64;
        xcr0 as "env.xcr0": u64;
        xstate_bv as "env.xstate_bv": u64;
        ymm_high as "env.xmm_regs[1]": [YmmHighRegister; 16];
    }
    subsections {
        tsc_khz: CpuTscFrequency;
        poll_control_msr: CpuPollControl;
        misc_enable: CpuMiscEnable;
    }
}

layout! {
    /// A segment register, with what is hidden of it.
    pub struct Segment = "segment", version 1 {
        selector: u32;
        base: u64;
        limit: u32;
        flags: u32;
    }
}

layout! {
    /// The lower half of a vector register.
    pub struct XmmRegister = "xmm_reg", version 1 {
        quad_0 as "_q_ZMMReg[0]": u64;
        quad_1 as "_q_ZMMReg[1]": u64;
    }
}

layout! {
    /// The upper half of a vector register of 256 bits.
    pub struct YmmHighRegister = "ymmh_reg", version 1 {
        quad_2 as "_q_ZMMReg[2]": u64;
        quad_3 as "_q_ZMMReg[3]": u64;
    }
}

layout! {
    /// A variable range of memory types.
    pub struct MtrrRange = "mtrr_var", version 1 {
        base: u64;
        mask: u64;
    }
}

layout! {
    /// Frequency of the time stamp counter, for a destination that has another.
    pub struct CpuTscFrequency = "cpu/tsc_khz", version 1 {
        tsc_khz as "env.tsc_khz": i64;
    }
}

layout! {
    /// Halt polling that the guest has asked the host not to do.
    pub struct CpuPollControl = "cpu/poll_control_msr", version 1 {
        poll_control_msr as "env.poll_control_msr": u64;
    }
}

layout! {
    /// IA32_MISC_ENABLE where it is not as after a reset.
    pub struct CpuMiscEnable = "cpu/msr_ia32_misc_enable", version 1 {
        misc_enable as "env.msr_ia32_misc_enable": u64;
    }
}

/// A register of the x87, as FXSAVE has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FpRegister {
    /// The low 64 bits.
    pub mantissa: u64,
    /// Sign and exponent.
    pub exponent: u16,
}

impl Device for FpRegister {
    const DESCRIPTION: Description = Description::new("fpreg", 0);

    fn fields(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        fields.field("tmp.mantissa", &mut self.mantissa)?;
        fields.field("tmp.exponent", &mut self.exponent)
    }
}
