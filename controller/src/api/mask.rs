//! Field masks of limits: each resource has a pair of them, one for each direction, with figures in each.

/// A direction: its name in masks, what there is, and what is wanted.
pub(super) type Direction<'a, L> = (&'static str, &'a mut Option<L>, Option<L>);

/// Copies what `path` names, which was validated: `DIRECTION`, or `DIRECTION.FIGURE` by `copy_figure`.
pub(super) fn apply_limit<L: Copy + Default>(
    path: &str,
    directions: [Direction<'_, L>; 2],
    copy_figure: impl Fn(&mut L, &L, &str),
) {
    let (direction, figure) = path.split_once('.').unwrap_or((path, ""));
    for (name, own, wanted) in directions {
        match figure {
            _ if name != direction => {}
            "" => *own = wanted,
            figure => copy_figure(
                own.get_or_insert_default(),
                &wanted.unwrap_or_default(),
                figure,
            ),
        }
    }
}
