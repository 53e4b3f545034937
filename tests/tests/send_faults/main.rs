//! Our source against destinations that are not there, stall, cut, refuse or talk nonsense: it ends
//! in time, says what happened where, and knows whether its guest may run on.

#[cfg(test)]
mod answers;
#[cfg(test)]
mod command;
#[cfg(test)]
mod cuts;
#[cfg(test)]
mod fixture;
#[cfg(test)]
mod timeout;
