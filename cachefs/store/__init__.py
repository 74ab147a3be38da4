"""The local store. Read `content` for what it offers, `format` for what is on disk, `writer` for who may write."""
