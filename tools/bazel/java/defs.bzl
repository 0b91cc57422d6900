"""The rules for Java that Bazel 4 itself uses, as built into it."""

java_import = native.java_import
java_runtime = native.java_runtime
java_toolchain = native.java_toolchain
