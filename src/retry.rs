//! One backoff for everything that tries again: exponential, jittered, capped.

use std::time::Duration;

use backoff::{ExponentialBackoff, ExponentialBackoffBuilder, backoff::Backoff as _};

/// How often and how soon something is tried again. Checked when built.
#[derive(Debug, Clone, PartialEq)]
pub struct RetryPolicy {
    attempts: u32,
    initial: Duration,
    max: Duration,
    multiplier: f64,
    jitter: f64,
}

/// Why settings make no policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RetryPolicyError {
    /// No attempt at all.
    #[error("attempts must be at least 1")]
    Attempts,
    /// A first delay of nothing spins.
    #[error("initial must be longer than zero")]
    Initial,
    /// The cap is below the start.
    #[error("max must be at least initial")]
    Max,
    /// Delays would shrink.
    #[error("multiplier must be at least 1.0 and at most 100.0")]
    Multiplier,
    /// More than the whole delay, or less than none.
    #[error("jitter must be between 0.0 and 1.0")]
    Jitter,
}

impl RetryPolicy {
    /// A policy of `attempts` in all (the first included), the first delay, the longest, the
    /// factor from one to the next, and the part of each delay that is random (0.2: 80-120%).
    ///
    /// # Errors
    /// Where the settings make no sense together; see [`RetryPolicyError`].
    pub fn new(
        attempts: u32,
        initial: Duration,
        max: Duration,
        multiplier: f64,
        jitter: f64,
    ) -> Result<Self, RetryPolicyError> {
        if attempts == 0 {
            return Err(RetryPolicyError::Attempts);
        }
        if initial.is_zero() {
            return Err(RetryPolicyError::Initial);
        }
        if max < initial {
            return Err(RetryPolicyError::Max);
        }
        if !(1.0..=100.0).contains(&multiplier) {
            return Err(RetryPolicyError::Multiplier);
        }
        if !(0.0..=1.0).contains(&jitter) {
            return Err(RetryPolicyError::Jitter);
        }
        Ok(Self { attempts, initial, max, multiplier, jitter })
    }

    /// For connections and other things that are tried for ever: 100 ms to 10 s.
    #[must_use]
    pub const fn reconnect() -> Self {
        Self {
            attempts: u32::MAX,
            initial: Duration::from_millis(100),
            max: Duration::from_secs(10),
            multiplier: 2.0,
            jitter: 0.3,
        }
    }

    /// How many attempts there are in all.
    #[must_use]
    pub const fn attempts(&self) -> u32 {
        self.attempts
    }

    /// The delay after the attempt of that number, from 1.
    #[must_use]
    pub fn delay_after(&self, attempt: u32) -> Duration {
        // Beyond 64 doublings every delay is the cap; the loop stays short for any attempt.
        let mut backoff = self.start();
        let mut delay = backoff.next_delay();
        for _ in 1..attempt.min(64) {
            delay = backoff.next_delay();
        }
        delay
    }

    /// Starts counting delays.
    #[must_use]
    pub fn start(&self) -> Delays {
        Delays {
            max: self.max,
            backoff: ExponentialBackoffBuilder::new()
                .with_initial_interval(self.initial)
                .with_max_interval(self.max)
                .with_multiplier(self.multiplier)
                .with_randomization_factor(self.jitter)
                .with_max_elapsed_time(None)
                .build(),
        }
    }
}

impl Default for RetryPolicy {
    /// 8 attempts, from 200 ms to 5 min, doubling, 20% jitter.
    fn default() -> Self {
        Self {
            attempts: 8,
            initial: Duration::from_millis(200),
            max: Duration::from_secs(300),
            multiplier: 2.0,
            jitter: 0.2,
        }
    }
}

/// The delays of one thing that is being tried again.
#[derive(Debug)]
pub struct Delays {
    backoff: ExponentialBackoff,
    max: Duration,
}

impl Delays {
    /// The next delay: never zero, never above the cap.
    pub fn next_delay(&mut self) -> Duration {
        // The crate adds jitter on top of its cap, and ends only after a time we do not set.
        self.backoff
            .next_backoff()
            .unwrap_or(self.max)
            .clamp(Duration::from_millis(1).min(self.max), self.max)
    }

    /// Starts over: it worked.
    pub fn reset(&mut self) {
        self.backoff.reset();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn G7_delays_grow_to_the_cap_and_never_beyond(
            initial in 1u64..10_000,
            factor in 1u64..1_000,
            multiplier in 1.0f64..10.0,
            jitter in 0.0f64..=1.0,
            attempt in 1u32..1_000,
        ) {
            let initial = Duration::from_millis(initial);
            let max = initial * u32::try_from(factor).unwrap();
            let policy = RetryPolicy::new(8, initial, max, multiplier, jitter).unwrap();
            let delay = policy.delay_after(attempt);
            prop_assert!(delay <= max);
            prop_assert!(delay > Duration::ZERO);
            if attempt == 1 {
                prop_assert!(delay >= initial.mul_f64(1.0 - jitter).saturating_sub(Duration::from_nanos(2)));
            }
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let s = Duration::from_secs(1);
        assert_eq!(RetryPolicy::new(0, s, s, 2.0, 0.1), Err(RetryPolicyError::Attempts));
        assert_eq!(
            RetryPolicy::new(1, Duration::ZERO, s, 2.0, 0.1),
            Err(RetryPolicyError::Initial)
        );
        assert_eq!(RetryPolicy::new(1, s * 2, s, 2.0, 0.1), Err(RetryPolicyError::Max));
        assert_eq!(RetryPolicy::new(1, s, s, 0.5, 0.1), Err(RetryPolicyError::Multiplier));
        assert_eq!(RetryPolicy::new(1, s, s, f64::NAN, 0.1), Err(RetryPolicyError::Multiplier));
        assert_eq!(RetryPolicy::new(1, s, s, 2.0, 1.5), Err(RetryPolicyError::Jitter));
    }
}
