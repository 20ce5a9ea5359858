//! The largest element, the k largest, all in order, and running sums.

use super::view::{axis, shaped, store, store_ints};
use crate::{
    array::{Chip, Fault, Refusal},
    dtype::is_float,
    limits::{check, valid},
    math::choose::{argmax, cumsum, topk},
    op::{Kernel, Out, Tensor, operator},
    runtime::Runtime,
};

operator! {
    /// The index of the largest element along `dim`.
    ArgMax = aclnnArgMax, aclnnArgMaxGetWorkspaceSize (this: Tensor, dim: i64, keepdim: bool, out: Out)
}

impl Kernel for ArgMax {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "ArgMax", &[&self.this, &self.out])?;
        let (dim, mut want) = (axis(&self.this, self.dim)?, self.this.dims.clone());
        match self.keepdim {
            true => want[dim] = 1,
            false => drop(want.remove(dim)),
        }
        shaped("out", &self.out, &want)
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let dim = axis(&self.this, self.dim).expect("checked in phase 1");
        let indices = if is_float(self.this.dtype) {
            let x = rt.load(&self.this)?;
            argmax(&x.data, &x.dims, dim)
        } else {
            let x = rt.load_ints(&self.this)?;
            argmax(&x.data, &x.dims, dim)
        };
        store_ints(rt, &self.out, indices)
    }
}

/// Stores the first `k` along `dim` in order, and where they were.
fn first_k(
    rt: &mut Runtime,
    x: &Tensor,
    (dim, k, largest): (i64, usize, bool),
    (values, indices): (&Tensor, &Tensor),
) -> Result<(), Fault> {
    let dim = axis(x, dim).expect("checked in phase 1");
    if is_float(x.dtype) {
        let x = rt.load(x)?;
        let (best, at) = topk(&x.data, &x.dims, dim, k, largest);
        store(rt, values, best)?;
        return store_ints(rt, indices, at);
    }
    let x = rt.load_ints(x)?;
    let (best, at) = topk(&x.data, &x.dims, dim, k, largest);
    store_ints(rt, values, best)?;
    store_ints(rt, indices, at)
}

operator! {
    /// The k largest (or smallest) along `dim`, in order, and where they were.
    Topk = aclnnTopk, aclnnTopkGetWorkspaceSize
        (this: Tensor, k: i64, dim: i64, largest: bool, sorted: bool, values: Out, indices: Out)
}

impl Kernel for Topk {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "Topk", &[&self.this, &self.values, &self.indices])?;
        valid(self.sorted, || "sorted must be true".to_owned())?;
        let (dim, mut want) = (axis(&self.this, self.dim)?, self.this.dims.clone());
        valid((1..=want[dim]).contains(&self.k), || format!("k is {} of {}", self.k, want[dim]))?;
        want[dim] = self.k;
        shaped("valuesOut", &self.values, &want)?;
        shaped("indicesOut", &self.indices, &want)
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        first_k(rt, &self.this, (self.dim, self.k as usize, self.largest), (&self.values, &self.indices))
    }
}

operator! {
    /// All elements along `dim` in order, and where they were.
    #[expect(dead_code, reason = "equal elements keep their order, asked for or not")]
    Sort = aclnnSort, aclnnSortGetWorkspaceSize
        (this: Tensor, stable: bool, dim: i64, descending: bool, values: Out, indices: Out)
}

impl Kernel for Sort {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "Sort", &[&self.this, &self.values, &self.indices])?;
        axis(&self.this, self.dim)?;
        shaped("valuesOut", &self.values, &self.this.dims)?;
        shaped("indicesOut", &self.indices, &self.this.dims)
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let len = self.this.dims[axis(&self.this, self.dim).expect("checked in phase 1")] as usize;
        first_k(rt, &self.this, (self.dim, len, self.descending), (&self.values, &self.indices))
    }
}

operator! {
    /// Running sums along `dim`.
    Cumsum = aclnnCumsum, aclnnCumsumGetWorkspaceSize (this: Tensor, dim: i64, dtype: i32, out: Out)
}

impl Kernel for Cumsum {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "Cumsum", &[&self.this, &self.out])?;
        axis(&self.this, self.dim)?;
        let (asked, held) = (self.dtype, self.out.dtype);
        valid(asked == held, || format!("aclDataType {asked} is asked for, and the output holds {held}"))?;
        shaped("out", &self.out, &self.this.dims)
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let dim = axis(&self.this, self.dim).expect("checked in phase 1");
        if is_float(self.this.dtype) {
            let x = rt.load(&self.this)?;
            let wide: Vec<f64> = x.data.iter().map(|&v| f64::from(v)).collect();
            return store(rt, &self.out, cumsum(&wide, &x.dims, dim).into_iter().map(|v| v as f32).collect());
        }
        let x = rt.load_ints(&self.this)?;
        store_ints(rt, &self.out, cumsum(&x.data, &x.dims, dim))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::bench::{Bench, F16, F32, I32, I64, turned};

    #[test]
    fn the_first_of_the_largest_is_chosen() {
        let b = Bench::new(Chip::A2);
        let x = b.floats(&[2, 3], F16, &[1.0, 3.0, 3.0, 5.0, 4.0, 5.0]);
        for (dtype, keepdim, dims) in [(I32, false, vec![2]), (I64, true, vec![2, 1])] {
            let out = b.out(&dims, dtype);
            b.run(&ArgMax { this: x.clone(), dim: -1, keepdim, out: out.clone() }).unwrap();
            assert_eq!(b.read_ints(&out), [1, 0]);
            assert_eq!(b.check(&ArgMax { this: x.clone(), dim: -1, keepdim: !keepdim, out }), 161_002);
        }
        let (ints, out) = (b.ints(&[2, 2], I64, &[1 << 53, (1 << 53) + 1, 0, 0]), b.out(&[2], I64));
        b.run(&ArgMax { this: ints, dim: 1, keepdim: false, out: out.clone() }).unwrap();
        assert_eq!(b.read_ints(&out), [1, 0]);
    }

    #[test]
    fn the_best_come_in_order_with_their_indices() {
        let b = Bench::new(Chip::A2);
        let x = b.floats(&[2, 3], F32, &[1.0, 3.0, 2.0, 6.0, 4.0, 5.0]);
        let (values, indices) = (b.out(&[2, 2], F32), b.out(&[2, 2], I64));
        let best = |this: &Tensor, k, dim, largest, sorted| Topk {
            this: this.clone(),
            k,
            dim,
            largest,
            sorted,
            values: values.clone(),
            indices: indices.clone(),
        };
        b.run(&best(&x, 2, 1, true, true)).unwrap();
        assert_eq!((b.read(&values), b.read_ints(&indices)), (vec![3.0, 2.0, 6.0, 5.0], vec![1, 2, 0, 2]));
        let tall = b.floats(&[2, 3], F32, &[1.0, 3.0, 2.0, 6.0, 4.0, 5.0]);
        b.run(&best(&turned(&tall), 2, 0, false, true)).unwrap();
        assert_eq!((b.read(&values), b.read_ints(&indices)), (vec![1.0, 4.0, 2.0, 5.0], vec![0, 1, 2, 2]));
        assert_eq!(b.check(&best(&x, 2, 1, true, false)), 161_002);
        assert_eq!(b.check(&best(&x, 4, 1, true, true)), 161_002);
        assert_eq!(b.check(&best(&x, 3, 1, true, true)), 161_002);
    }

    #[test]
    fn sorting_and_running_sums_go_along_their_dimension() {
        let b = Bench::new(Chip::A2);
        let x = b.floats(&[2, 3], F32, &[1.0, 3.0, 2.0, 6.0, 4.0, 5.0]);
        let (values, indices) = (b.out(&[2, 3], F32), b.out(&[2, 3], I64));
        let sort = Sort { this: x.clone(), stable: true, dim: 1, descending: true, values: values.clone(), indices };
        b.run(&sort).unwrap();
        assert_eq!(b.read(&values), [3.0, 2.0, 1.0, 6.0, 5.0, 4.0]);
        assert_eq!(b.read_ints(&sort.indices), [1, 2, 0, 0, 2, 1]);
        b.run(&Cumsum { this: x.clone(), dim: 1, dtype: F32 as i32, out: values.clone() }).unwrap();
        assert_eq!(b.read(&values), [1.0, 4.0, 6.0, 6.0, 10.0, 15.0]);
        assert_eq!(b.check(&Cumsum { this: x, dim: 1, dtype: F16 as i32, out: values }), 161_002);
        let (counts, ends) = (b.ints(&[3], I32, &[2, 0, 3]), b.out(&[3], I64));
        b.run(&Cumsum { this: counts, dim: 0, dtype: I64 as i32, out: ends.clone() }).unwrap();
        assert_eq!(b.read_ints(&ends), [2, 2, 5]);
    }
}
