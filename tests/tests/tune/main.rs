//! `multifd tune`: what it says of a guest in a checkpoint, in a stream and in a live QEMU, and
//! what becomes of its advice.

mod advice;
mod fixture;
mod live;
mod page;
mod refusals;
mod sources;
