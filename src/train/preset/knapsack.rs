//! The most valuable choice of one option a group within a budget.

/// One way to take a group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Choice {
    pub cost: usize,
    pub value: f64,
}

/// Steps that a budget is counted in.
const UNITS: usize = 512;

/// For each group the option to take, or none of them, such that the costs are within `budget` and the values' sum is as
/// large as costs rounded up to a 512th of the budget allow.
pub(super) fn pack(groups: &[Vec<Choice>], budget: usize) -> Vec<Option<usize>> {
    let unit = budget.div_ceil(UNITS).max(1);
    let room = budget / unit;
    // best[u]: the largest value within u units; taken[g][u]: what it takes of group g.
    let mut best = vec![0.0f64; room + 1];
    let mut taken: Vec<Vec<Option<usize>>> = Vec::with_capacity(groups.len());
    for options in groups {
        let (mut next, mut choice) = (best.clone(), vec![None; room + 1]);
        for (i, o) in options.iter().enumerate() {
            let cost = o.cost.div_ceil(unit);
            for u in cost..=room {
                let value = best[u - cost] + o.value;
                if value > next[u] {
                    (next[u], choice[u]) = (value, Some(i));
                }
            }
        }
        best = next;
        taken.push(choice);
    }
    let mut left = room;
    let mut chosen = vec![None; groups.len()];
    for g in (0..groups.len()).rev() {
        chosen[g] = taken[g][left];
        if let Some(i) = chosen[g] {
            left -= groups[g][i].cost.div_ceil(unit);
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_that_fits() {
        let of = |options: &[(usize, f64)]| {
            options.iter().map(|&(cost, value)| Choice { cost, value }).collect::<Vec<_>>()
        };
        let groups = [of(&[(3, 3.0), (6, 5.0)]), of(&[(5, 6.0)]), of(&[(4, 4.0), (9, 20.0)])];
        let value = |chosen: &[Option<usize>]| {
            chosen.iter().zip(&groups).filter_map(|(c, g)| c.map(|i| g[i].value)).sum::<f64>()
        };
        // Against every combination.
        for budget in 0..=20 {
            let mut best = 0.0f64;
            for code in 0..3usize * 2 * 3 {
                let picks = [code % 3, code / 3 % 2, code / 6];
                let chosen: Vec<Option<usize>> = picks.iter().map(|p| p.checked_sub(1)).collect();
                let cost: usize = chosen.iter().zip(&groups).filter_map(|(c, g)| c.map(|i| g[i].cost)).sum();
                if cost <= budget {
                    best = best.max(value(&chosen));
                }
            }
            let chosen = pack(&groups, budget);
            assert_eq!(value(&chosen), best, "{budget}: {chosen:?}");
            let cost: usize = chosen.iter().zip(&groups).filter_map(|(c, g)| c.map(|i| g[i].cost)).sum();
            assert!(cost <= budget);
        }
        assert_eq!(pack(&[], 5), []);
    }
}
