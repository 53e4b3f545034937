//! What the embedder does on each thread that is made for it.

use std::fmt;
use std::sync::Arc;

/// A function that is called on every new thread, before it does anything else, with the thread's
/// name: for affinity, a cgroup, a seccomp filter. Clones share the function. Default: nothing is
/// called.
#[derive(Clone, Default)]
pub struct ThreadHook(Option<Arc<OnStart>>);

type OnStart = dyn Fn(&str) + Send + Sync;

impl ThreadHook {
    /// A hook that calls `on_start`.
    pub fn new(on_start: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(on_start)))
    }

    /// Calls the function. To be called on the new thread.
    pub fn call(&self, thread: &str) {
        if let Some(on_start) = &self.0 {
            on_start(thread);
        }
    }
}

impl fmt::Debug for ThreadHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "ThreadHook(set)" } else { "ThreadHook(none)" })
    }
}
