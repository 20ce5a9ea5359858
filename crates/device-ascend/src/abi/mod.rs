//! The C ABI of CANN as facts: types, numbers, and tables of functions found by name at run time. Nothing here
//! decides anything, and nothing is generated from or copied out of the toolkit's headers.
//!
//! Invariant: a field of a table has the type of the C function of its name.

pub(crate) mod codes;
pub(crate) mod consts;
pub(crate) mod operators;
pub(crate) mod runtime;

use std::ffi::c_void;

/// Declares a table of C functions, each `field: "symbol" fn(arguments) -> result`, required or optional, and the code that
/// looks them up.
macro_rules! functions {
    (
        $(#[$meta:meta])*
        pub(crate) struct $table:ident {
            required { $($required:ident: $required_name:literal fn($($required_arg:ty),* $(,)?) -> $required_result:ty;)* }
            optional { $($optional:ident: $optional_name:literal fn($($optional_arg:ty),* $(,)?) -> $optional_result:ty;)* }
        }
    ) => {
        $(#[$meta])*
        pub(crate) struct $table {
            $(pub(crate) $required: unsafe extern "C" fn($($required_arg),*) -> $required_result,)*
            $(pub(crate) $optional: Option<unsafe extern "C" fn($($optional_arg),*) -> $optional_result>,)*
        }

        impl $table {
            /// Names of the functions without which there is no device.
            pub(crate) const REQUIRED: &[&str] = &[$($required_name),*];
            /// Names of those that may be missing.
            pub(crate) const OPTIONAL: &[&str] = &[$($optional_name),*];

            /// Takes what `find` finds; else the names of all required functions that are missing.
            ///
            /// # Safety
            /// What `find` gives for a name is the address of the C function of that name, valid for the life of the process.
            pub(crate) unsafe fn load(
                find: impl Fn(&'static str) -> Option<crate::abi::Symbol>,
            ) -> Result<Self, Vec<&'static str>> {
                let missing: Vec<_> = Self::REQUIRED.iter().copied().filter(|name| find(name).is_none()).collect();
                if !missing.is_empty() {
                    return Err(missing);
                }
                // SAFETY: the caller's promise; the types are those of the table above.
                unsafe {
                    Ok(Self {
                        $($required: find($required_name).expect("none is missing").cast(),)*
                        $($optional: find($optional_name).map(|symbol| symbol.cast()),)*
                    })
                }
            }
        }
    };
}
pub(crate) use functions;

/// The address of a C function.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Symbol(pub(crate) *const c_void);

impl Symbol {
    /// The function pointer.
    ///
    /// # Safety
    /// `F` is a function pointer type, and that of the function at this address.
    pub(crate) unsafe fn cast<F: Copy>(self) -> F {
        const { assert!(size_of::<F>() == size_of::<*const c_void>()) };
        // SAFETY: pointers of one size; the caller says that the type is right.
        unsafe { std::mem::transmute_copy(&self.0) }
    }
}

/// Defines opaque handles: what C gives as `void *` or as a pointer to a type that nobody sees.
macro_rules! handles {
    ($($(#[$meta:meta])* $name:ident;)*) => {
        $(
            $(#[$meta])*
            #[repr(transparent)]
            #[derive(Debug, Clone, Copy, PartialEq, Eq)]
            pub(crate) struct $name(pub(crate) *mut c_void);

            impl $name {
                #[allow(dead_code)] // of some only
                pub(crate) const NULL: Self = Self(std::ptr::null_mut());
            }
        )*
    };
}

handles! {
    /// `aclrtContext`.
    Context;
    /// `aclrtStream`.
    Stream;
    /// `aclTensor *`.
    TensorPtr;
    /// `aclScalar *`.
    ScalarPtr;
    /// `aclIntArray *`.
    IntArrayPtr;
    /// `aclTensorList *`.
    TensorListPtr;
    /// `aclOpExecutor *`.
    ExecutorPtr;
    /// `aclmdlRI`.
    Graph;
    /// `HcclComm`.
    Comm;
}
