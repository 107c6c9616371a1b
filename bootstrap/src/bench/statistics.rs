//! Statistics for all benchmarks: medians, so that one outlier does not change the result.

/// Returns the middle value. For an even number of values, returns the larger of the two middle values. For no values,
/// returns `NaN`.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Divides the two series round by round and returns the median of these ratios. A disturbance in one round affects both
/// series alike, so this result is steadier than the ratio of the two medians. Returns `NaN` if either series is empty.
pub fn median_ratio(of: &[f64], to: &[f64]) -> f64 {
    median(of.iter().zip(to).map(|(of, to)| of / to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_upper_of_two_in_the_middle() {
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0, 3.0, 2.0]), 3.0);
        assert!(median([]).is_nan());
    }

    #[test]
    fn a_ratio_is_taken_round_by_round() {
        // The machine was three times as slow in the second round.
        assert_eq!(median_ratio(&[6.0, 2.0, 6.0], &[3.0, 1.0, 3.0]), 2.0);
        assert!(median_ratio(&[], &[1.0]).is_nan());
    }
}
