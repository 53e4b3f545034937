//! The public parsers and encoders against bytes spelled out by hand, against recorded streams,
//! against each other and against noise.

#[cfg(test)]
mod every_parser;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod limits;
#[cfg(test)]
mod noise;
#[cfg(test)]
mod recorded;
#[cfg(test)]
mod round_trip;
#[cfg(test)]
mod strategies;
