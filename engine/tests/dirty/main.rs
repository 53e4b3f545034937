//! Dirty logs on real memory, under writers that do not stop for them.

#[cfg(test)]
mod attempts;
#[cfg(test)]
mod changes;
#[cfg(test)]
mod huge_pages;
#[cfg(test)]
mod kvm;
#[cfg(test)]
#[path = "../kvm_guest/mod.rs"]
mod kvm_guest;
#[cfg(test)]
mod memory;
#[cfg(test)]
mod skip;
#[cfg(test)]
mod slots;
#[cfg(test)]
mod software;
#[cfg(test)]
mod userfault;
