//! Times in words.

/// Seconds since 1970 as RFC 3339 in UTC, such as `2026-01-02T03:04:05Z`.
///
/// The days are counted from 1 March, so that a leap day is the last of its year
/// ("chrono-Compatible Low-Level Date Algorithms", `civil_from_days`, Howard Hinnant).
pub fn utc(secs: u64) -> String {
    let (days, second) = (secs / 86_400, secs % 86_400);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);

    // Days since 1 March of the year 0, in eras of 400 years.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let leap_days = day_of_era / 1460 - day_of_era / 36_524 + day_of_era / 146_096;
    let year_of_era = (day_of_era - leap_days) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);

    // Months from March on have 31, 30, 31, 30, 31 days, again and again.
    let months = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * months + 2) / 5 + 1;
    let month = if months < 10 { months + 3 } else { months - 9 };
    let year = 400 * era + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_become_the_time_that_date_prints() {
        // By `date -u -d @<seconds> +%FT%TZ` of coreutils.
        for (secs, time) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_709_210_096, "2024-02-29T12:34:56Z"),
            (1_767_225_599, "2025-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(secs), time);
        }
    }
}
